"""What every tokenizer does: encode, decode, batches with masks, offsets, save and load."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import to_dict
from zoo.errors import ZooError

Ids = NDArray[np.int64]
Side = Literal["left", "right"]
Text = str | bytes


def to_bytes(text: Text) -> bytes:
    """One byte a character, so that byte offsets are character offsets; what latin-1 lacks becomes `?`."""
    return text.encode("latin-1", "replace") if isinstance(text, str) else text


class Tokenizer(ABC):
    """Text to ids and back. Subclasses give the vocabulary, `flat_ids` and `_spans`.

    Attributes:
        name: key in the catalogue's TOKENIZERS.
        config: the frozen config it was built from.
        vocab: the token string of each id.
        special: ids of the special tokens that exist, keys among pad, bos, eos, unk, mask, cls, sep.
        pad_side: where `encode_batch` pads unless told otherwise.
        prefix, suffix: ids that `add_special` puts before and behind each text.
        hidden: ids that `decode(skip_special=True)` leaves out.
        exact: True when a text's token count does not depend on its letters (character tokenizers).
    """

    name: ClassVar[str]
    config: Any
    vocab: list[str]
    special: dict[str, int]
    pad_side: Side = "right"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    hidden: frozenset[int] = frozenset()
    exact: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.vocab)

    @abstractmethod
    def flat_ids(self, texts: Sequence[Text]) -> tuple[Ids, Ids]:
        """Ids (of any integer type) of all texts one after the other, and how many each has; no special tokens."""

    @abstractmethod
    def _spans(self, text: Text) -> NDArray[np.int64]:
        """[L, 2] start and end in the text of each id of `flat_ids([text])`."""

    def encode(self, text: Text, add_special: bool = True) -> Ids:
        """Ids of one text, int64 [L]."""
        flat, _ = self.flat_ids([text])
        before, behind = (self.prefix, self.suffix) if add_special else ((), ())
        ids = np.empty(len(before) + len(flat) + len(behind), np.int64)
        ids[: len(before)], ids[len(ids) - len(behind) :] = before, behind
        ids[len(before) : len(ids) - len(behind)] = flat
        return ids

    def encode_pair(self, first: Text, second: Text) -> tuple[Ids, Ids]:
        """Ids of a pair with its special tokens, and which of the two each token belongs to (0 or 1), both [L]."""
        one, two = (
            self.encode(first),
            np.append(self.encode(second, add_special=False), np.array(self.suffix, np.int64)),
        )
        kinds = np.repeat(np.array([0, 1], np.int64), [len(one), len(two)])
        return np.concatenate([one, two]), kinds

    def encode_batch(
        self,
        texts: Sequence[Text],
        max_len: int | None = None,
        pad_side: Side | None = None,
        add_special: bool = True,
        *,
        pad_to: int | None = None,
        truncate: Literal["error", "left", "right"] = "error",
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids int64 [B, L] and the mask of real tokens, bool [B, L].

        Args:
            texts: B texts.
            max_len: longest row allowed, special tokens included.
            pad_side: `left` or `right`; None takes the tokenizer's own.
            add_special: put `prefix` and `suffix` around each text.
            pad_to: pad to at least this length rather than to the longest row.
            truncate: what happens to longer rows: an error, or tokens are cut from that side (specials stay).

        Raises:
            ZooError: a row is longer than *max_len* and *truncate* is `error`; both numbers are named.
        """
        flat, counts = self.flat_ids(texts)
        return self.assemble(flat, counts, max_len, pad_side, add_special=add_special, pad_to=pad_to, truncate=truncate)

    def assemble(
        self,
        flat: Ids,
        counts: Ids,
        max_len: int | None = None,
        pad_side: Side | None = None,
        *,
        add_special: bool = True,
        pad_to: int | None = None,
        truncate: Literal["error", "left", "right"] = "error",
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """As `encode_batch`, from ids that were computed before: *flat* holds the rows, *counts* their lengths."""
        before, behind = (self.prefix, self.suffix) if add_special else ((), ())
        extra = len(before) + len(behind)
        if max_len is not None and len(counts) and int(counts.max()) + extra > max_len:
            if truncate == "error":
                row = int(counts.argmax())
                raise ZooError(
                    f"sequence {row} of the batch has {int(counts[row]) + extra} tokens, more than max_len={max_len}; "
                    "shorten it or choose truncation explicitly"
                )
            if max_len < extra:
                raise ZooError(f"max_len={max_len} leaves no room for the {extra} special tokens of each text")
            flat, counts = _cut(flat, counts, max_len - extra, truncate)
        total = counts + extra
        width = max(int(total.max()) if len(total) else 0, pad_to or 0)
        side = pad_side or self.pad_side
        if len(total) and bool((total == width).all()):  # rows of one length need no bookkeeping
            ids = np.empty((len(counts), width), np.int64)  # [B, L]
            ids[:, : len(before)], ids[:, width - len(behind) :] = before, behind
            ids[:, len(before) : width - len(behind)] = flat.reshape(len(counts), -1)
            return ids, np.ones(ids.shape, np.bool_)
        if "pad" not in self.special:
            raise ZooError(
                f"the {self.name} tokenizer has no padding token, so texts of one batch must be equally long"
            )
        ids = np.full((len(counts), width), self.special["pad"], np.int64)  # [B, L]
        column = np.arange(width)
        first = width - total if side == "left" else np.zeros_like(total)
        last = first + total
        valid = (column >= first[:, None]) & (column < last[:, None])  # [B, L]
        ends = np.cumsum(counts)
        places = zip(first + len(before), last - len(behind), ends - counts, ends, strict=True)
        for row, (start, end, low, high) in enumerate(places):
            ids[row, start:end] = flat[low:high]
        rows = np.arange(len(counts))
        for offset, token in enumerate(before):
            ids[rows, first + offset] = token
        for offset, token in enumerate(reversed(behind), 1):
            ids[rows, last - offset] = token
        return ids, valid

    def encode_windows(self, windows: NDArray[np.uint8]) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids and mask [B, L] of equally long texts given as bytes, uint8 [B, letters]; no special tokens added."""
        return self.encode_batch([row.tobytes() for row in windows], add_special=False)

    def counts(self, texts: Sequence[Text], add_special: bool = True) -> Ids:
        """Number of tokens of each text, int64 [B]."""
        extra = len(self.prefix) + len(self.suffix) if add_special else 0
        return self.flat_ids(texts)[1] + extra

    def offsets(self, text: Text, add_special: bool = True) -> NDArray[np.int64]:
        """[L, 2] start and end in *text* of each token of `encode(text, add_special)`; special tokens have (0, 0)."""
        spans = self._spans(text)
        if not add_special:
            return spans
        frame = [np.zeros((len(ids), 2), np.int64) for ids in (self.prefix, self.suffix)]
        return np.concatenate([frame[0], spans, frame[1]])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token strings of ids.

        Raises:
            ZooError: an id outside the vocabulary.
        """
        try:
            return [self.vocab[_index(i)] for i in ids]
        except IndexError:
            raise ZooError(f"an id lies outside the {self.name} tokenizer's {self.vocab_size} tokens") from None

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; with *skip_special* without the special tokens."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self.hidden)]
        return "".join(self.tokens(kept))

    def sequence(self, ids: Iterable[int]) -> str:
        """The bases of ids: no special token, no separator, whatever `decode` prints between tokens."""
        marks = set(self.special.values()) | self.hidden
        return "".join(self.tokens(int(i) for i in ids if int(i) not in marks))

    def section(self) -> dict[str, Any]:
        """`{"name": ..., **fields}`, from which `zoo.tokenizers.build` makes an equal tokenizer."""
        return {"name": self.name, **to_dict(self.config)}

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer_config.json` (and the files it needs) into a folder."""
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.section(), indent=2) + "\n"
        (place / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer saved in a folder; called on a subclass it must be of that class.

        Raises:
            ZooError: no saved tokenizer there, or one of another kind.
        """
        from zoo.tokenizers import load

        found = load(directory)
        if not isinstance(found, cls):
            raise ZooError(f"{directory} holds a {found.name} tokenizer, not a {cls.name} one")
        return found


def _index(i: int) -> int:
    if i < 0:
        raise IndexError(i)
    return int(i)


def _cut(flat: Ids, counts: Ids, most: int, side: str) -> tuple[Ids, Ids]:
    """Keep at most *most* ids of each row, dropping from *side*."""
    ends = np.cumsum(counts)
    within = np.arange(len(flat)) - np.repeat(ends - counts, counts)  # place of each id in its row
    keep = within >= np.repeat(counts - most, counts) if side == "left" else within < most
    return flat[keep], np.minimum(counts, most)
