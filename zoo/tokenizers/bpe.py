"""Byte-pair encoding through Hugging Face `tokenizers`: DNABERT-2, METAGENE-1, and ones trained here."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo._resources import folder
from zoo.config import config
from zoo.errors import ZooError
from zoo.tokenizers.base import Ids, Text, Tokenizer

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
ROLES = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")


@config
class BpeTokenizerConfig:
    """Where the `tokenizer.json` is and what its special tokens mean; everything else is in that file.

    Attributes:
        file: the `tokenizer.json`; relative to the folder the config came from, else to the working directory.
            None looks for it in that folder and then in the local Hugging Face cache.
        hub: Hub repository that publishes the file.
        revision: revision of that repository.
        sha256: of the file; checked when given.
        pad, bos, eos, unk, mask, cls, sep: token strings of the special tokens that exist.
        lower: lower case: `keep` as the official code (both tokenizers read it as unknown), or `upper`.
        u: the RNA letter U: `keep`, or `t` to read it as T.
        pad_side: side padded by default.
    """

    file: str | None = None
    hub: str | None = None
    revision: str | None = None
    sha256: str | None = None
    pad: str | None = "[PAD]"
    bos: str | None = None
    eos: str | None = None
    unk: str | None = "[UNK]"
    mask: str | None = "[MASK]"
    cls: str | None = None
    sep: str | None = None
    lower: Literal["keep", "upper"] = "keep"
    u: Literal["keep", "t"] = "keep"
    pad_side: Literal["left", "right"] = "right"


class BpeTokenizer(Tokenizer):
    """A `tokenizer.json` with the verbs of this zoo. Texts are `str`; `bytes` are read as latin-1.

    Raises:
        ZooError: the file is missing, is not the one of `sha256`, or lacks a special token the config names.
    """

    name: ClassVar[str] = "bpe"
    Config = BpeTokenizerConfig

    def __init__(self, config: BpeTokenizerConfig | None = None, base: Path | None = None) -> None:
        from tokenizers import Tokenizer as Fast

        self.config = config or BpeTokenizerConfig()
        self.path = _find(self.config, base)
        raw = self.path.read_bytes()
        if self.config.sha256 and hashlib.sha256(raw).hexdigest() != self.config.sha256:
            raise ZooError(
                f"{self.path} is not the expected tokenizer file: its sha256 is {hashlib.sha256(raw).hexdigest()}, "
                f"the tokenizer's config says {self.config.sha256}"
            )
        try:
            self.fast: tokenizers.Tokenizer = Fast.from_str(raw.decode("utf-8"))
        except Exception as error:  # the Rust side raises plain Exception
            raise ZooError(f"{self.path} is not a tokenizer.json: {error}") from None
        self.fast.no_padding()
        self.fast.no_truncation()
        size = self.fast.get_vocab_size(with_added_tokens=True)
        self.vocab = [self.fast.id_to_token(i) or "" for i in range(size)]
        self.special = {}
        for role in ROLES:
            token = getattr(self.config, role)
            if token is not None:
                found = self.fast.token_to_id(token)
                if found is None:
                    raise ZooError(f"{self.path} has no token '{token}', which the tokenizer's config names as {role}")
                self.special[role] = found
        self.pad_side = self.config.pad_side
        frame = self.fast.encode("").ids  # the template around nothing: its special tokens alone
        probe = self.fast.encode("A").ids
        text = self.fast.encode("A", add_special_tokens=False).ids
        at = next(
            (
                i
                for i in range(len(probe) + 1)
                if probe[i : i + len(text)] == text and frame == probe[:i] + probe[i + len(text) :]
            ),
            0,
        )
        self.prefix, self.suffix = tuple(frame[:at]), tuple(frame[at:])
        registered = {i for i, token in self.fast.get_added_tokens_decoder().items() if token.special}
        self.hidden = frozenset(registered)

    def _text(self, text: Text) -> str:
        out = text if isinstance(text, str) else text.decode("latin-1")
        if self.config.lower == "upper":
            out = out.upper()
        if self.config.u == "t":
            out = out.replace("U", "T")
        return out

    def flat_ids(self, texts: Sequence[Text]) -> tuple[Ids, Ids]:
        rows = self.fast.encode_batch_fast([self._text(text) for text in texts], add_special_tokens=False)
        ids = [row.ids for row in rows]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter((i for row in ids for i in row), np.int64, int(counts.sum()))
        return flat, counts

    def _spans(self, text: Text) -> NDArray[np.int64]:
        offsets = self.fast.encode(self._text(text), add_special_tokens=False).offsets
        return np.array(offsets, np.int64).reshape(-1, 2)

    def encode_pair(self, first: Text, second: Text) -> tuple[Ids, Ids]:
        both = self.fast.encode(self._text(first), self._text(second))
        return np.array(both.ids, np.int64), np.array(both.type_ids, np.int64)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Tokens joined by blanks, as the library does; `sequence` gives the bases without them."""
        return self.fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer_config.json` and the `tokenizer.json` beside it."""
        super().save(directory)
        target = Path(directory) / FILE
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)

    def section(self) -> dict[str, object]:
        return {**super().section(), "file": None}  # an artifact's file lies beside its config


def _find(config: BpeTokenizerConfig, base: Path | None) -> Path:
    # a recipe that takes a tokenizer of the catalogue has its fields alone, not its folder
    places = [place for place in (base, Path.cwd(), folder("tokenizers")) if place is not None]
    if config.file is not None:
        for place in places:
            if (place / os.path.expanduser(config.file)).is_file():
                return place / os.path.expanduser(config.file)
        raise ZooError(f"tokenizer file '{config.file}' does not exist" + _advice(config))
    if base is not None and (base / FILE).is_file():
        return base / FILE
    if config.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.hub, FILE, revision=config.revision)  # looks only, downloads nothing
        if isinstance(cached, str):
            return Path(cached)
    raise ZooError("the bpe tokenizer has no tokenizer.json" + _advice(config))


def _advice(config: BpeTokenizerConfig) -> str:
    if not config.hub:
        return "; set the tokenizer's file to its path"
    return f"; get {FILE} from https://huggingface.co/{config.hub} and set the tokenizer's file to its path"


def train(texts: Iterable[str], vocab_size: int, path: str | Path, *, chunk: int = 128) -> None:
    """Learn merges from DNA texts and write a `tokenizer.json` with DNABERT-2's special tokens and template.

    Args:
        texts: upper-case sequences; they are cut into pieces of *chunk* bases, within which merges are counted.
        vocab_size: tokens, the five special ones included.
        path: the file written.
        chunk: piece length; longer pieces cost more time and change little.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, processors, trainers

    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    fast = Fast(models.BPE(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=list("ACGT"), limit_alphabet=4,
        show_progress=False, max_token_length=32,
    )  # fmt: skip
    pieces = (text[i : i + chunk] for text in texts for i in range(0, len(text), chunk))
    fast.train_from_iterator(pieces, trainer)
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast.save(str(path))
