"""Character tokenizer with HyenaDNA's ids: one byte, one table look-up, one token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.tokenizers.base import Ids, Text, Tokenizer, to_bytes

SPECIALS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
IUPAC = "RYSWKMBDHV"


@config
class CharTokenizerConfig:
    """Options whose defaults give the ids of the official HyenaDNA repository.

    Attributes:
        letters: the alphabet, in id order, after the seven special tokens.
        template: special tokens added around a text: `sep` (text [SEP]; the repository and the -hf weights),
            `cls_sep` ([CLS] text [SEP]; the standalone script) or `none`.
        literals: read "[MASK]" and the like inside a text as the special token (the -hf weights do; the
            repository spells them out letter by letter).
        lower: soft-masked lower case: `unk` as the official code, or `upper` to read it as upper case.
        iupac: ambiguity letters RYSWKMBDHV: `unk`, or `n` to read them as N.
        u: the RNA letter U: `unk`, or `t` to read it as T.
        pad_side: side padded by default (the official code pads on the left).
    """

    letters: str = "ACGTN"
    template: Literal["sep", "cls_sep", "none"] = "sep"
    literals: bool = False
    lower: Literal["unk", "upper"] = "unk"
    iupac: Literal["unk", "n"] = "unk"
    u: Literal["unk", "t"] = "unk"
    pad_side: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        if not self.letters or len(set(self.letters)) != len(self.letters) or not self.letters.isascii():
            raise ValueError(f"letters must be different ASCII characters, got '{self.letters}'")
        if self.iupac == "n" and "N" not in self.letters:
            raise ValueError("iupac=n needs the letter N in letters")
        if self.u == "t" and "T" not in self.letters:
            raise ValueError("u=t needs the letter T in letters")


class CharTokenizer(Tokenizer):
    """[CLS]=0 [SEP]=1 [BOS]=2 [MASK]=3 [PAD]=4 [RESERVED]=5 [UNK]=6 A=7 C=8 G=9 T=10 N=11 with the defaults.

    Source: HyenaDNA's CharacterTokenizer; the end-of-sequence token is [SEP].
    """

    name: ClassVar[str] = "char"
    exact: ClassVar[bool] = True
    Config = CharTokenizerConfig

    def __init__(self, config: CharTokenizerConfig | None = None, base: Path | None = None) -> None:
        self.config = config or CharTokenizerConfig()
        self.vocab = [*SPECIALS, *self.config.letters]
        self.special = {"pad": 4, "bos": 2, "eos": 1, "unk": 6, "mask": 3, "cls": 0, "sep": 1}
        self.pad_side = self.config.pad_side
        self.prefix = (0,) if self.config.template == "cls_sep" else ()
        self.suffix = () if self.config.template == "none" else (1,)
        self.hidden = frozenset(range(len(SPECIALS)))
        self._table = self._make_table()
        self._literal = re.compile(rb"\[(?:CLS|SEP|BOS|MASK|PAD|UNK)\]")  # [RESERVED] was never registered

    def _make_table(self) -> bytes:
        table = bytearray([6] * 256)
        for i, letter in enumerate(self.config.letters, len(SPECIALS)):
            table[ord(letter)] = i
        if self.config.iupac == "n":
            for letter in IUPAC:
                if letter not in self.config.letters:
                    table[ord(letter)] = table[ord("N")]
        if self.config.u == "t" and "U" not in self.config.letters:
            table[ord("U")] = table[ord("T")]
        if self.config.lower == "upper":
            for code in range(ord("A"), ord("Z") + 1):
                if table[code + 32] == 6:
                    table[code + 32] = table[code]
        return bytes(table)

    def flat_ids(self, texts: Sequence[Text]) -> tuple[Ids, Ids]:
        parts = [to_bytes(text) for text in texts]
        joined = b"".join(parts)
        if self.config.literals and b"[" in joined:
            rows = [self._with_literals(part) for part in parts]
            return np.concatenate([*rows, np.empty(0, np.int64)]), np.array([len(row) for row in rows], np.int64)
        counts = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.frombuffer(joined.translate(self._table), np.uint8), counts

    def _with_literals(self, text: bytes) -> Ids:
        ids = np.frombuffer(text.translate(self._table), np.uint8).astype(np.int64)
        keep = np.ones(len(ids), np.bool_)
        for match in self._literal.finditer(text):
            keep[match.start() + 1 : match.end()] = False
            ids[match.start()] = SPECIALS.index(match.group().decode())
        return ids[keep]

    def encode_windows(self, windows: NDArray[np.uint8]) -> tuple[Ids, NDArray[np.bool_]]:
        ids = np.frombuffer(windows.tobytes().translate(self._table), np.uint8).astype(np.int64)
        return ids.reshape(windows.shape), np.ones(windows.shape, np.bool_)

    def counts(self, texts: Sequence[Text], add_special: bool = True) -> Ids:
        if self.config.literals:
            return super().counts(texts, add_special)
        extra = len(self.prefix) + len(self.suffix) if add_special else 0
        return np.fromiter(map(len, texts), np.int64, len(texts)) + extra

    def _spans(self, text: Text) -> NDArray[np.int64]:
        raw = to_bytes(text)
        start = np.arange(len(raw), dtype=np.int64)
        end = start + 1
        if self.config.literals and b"[" in raw:
            keep = np.ones(len(raw), np.bool_)
            for match in self._literal.finditer(raw):
                keep[match.start() + 1 : match.end()] = False
                end[match.start()] = match.end()
            start, end = start[keep], end[keep]
        return np.stack([start, end], 1)
