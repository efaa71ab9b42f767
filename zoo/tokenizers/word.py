"""Words of a fixed list, in lower case, for small question-answering sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.tokenizers.base import Ids, Text, Tokenizer

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
_PIECE = re.compile(r"\w+|[^\w\s]")


@config
class WordTokenizerConfig:
    """A list of words.

    Attributes:
        words: in id order, after the four special tokens; punctuation marks count as words.
    """

    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.words or len(set(self.words)) != len(self.words):
            raise ValueError("words must hold at least one word, and each once")
        for word in self.words:
            one = word.replace("_", "a").isalnum() or (len(word) == 1 and not word.isspace())
            if not one or word != word.lower():
                raise ValueError(f"'{word}' is not one word in lower case")


class WordTokenizer(Tokenizer):
    """<pad>=0 <s>=1 </s>=2 <unk>=3, then the words; nothing is put around a text."""

    name: ClassVar[str] = "word"
    Config = WordTokenizerConfig

    def __init__(self, config: WordTokenizerConfig, base: Path | None = None) -> None:
        self.config = config
        self.vocab = [*SPECIALS, *config.words]
        self.special = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
        self.hidden = frozenset(range(len(SPECIALS)))
        self._ids = {word: i for i, word in enumerate(self.vocab)}

    def flat_ids(self, texts: Sequence[Text]) -> tuple[Ids, Ids]:
        rows = [[self._ids.get(piece, 3) for piece in _PIECE.findall(_text(text).lower())] for text in texts]
        flat = np.array([i for row in rows for i in row], np.int64)
        return flat, np.array([len(row) for row in rows], np.int64)

    def _spans(self, text: Text) -> NDArray[np.int64]:
        return np.array([piece.span() for piece in _PIECE.finditer(_text(text))], np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The words with spaces between them."""
        return " ".join(self.tokens(int(i) for i in ids if not (skip_special and int(i) in self.hidden)))


def _text(text: Text) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
