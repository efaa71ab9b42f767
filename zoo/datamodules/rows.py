"""Rows of labelled sequences: tokenized once, batched with labels, reverse complements tokenized when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules import token_labels
from zoo.datamodules.augment import coins, integers, reverse_complement
from zoo.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from zoo.datamodules.labelled import LabelledDataConfig

Rows = list[NDArray[Any]]


class LabelledSource:
    """Rows of one split.

    Attributes:
        lengths: tokens of each row (of the longer of its two strands where both may be drawn), int64 [N].
        labels: [N], [N, K], or [N] arrays of one label a base.
        augment: draw reverse complements.

    Args:
        texts: the sequences.
        pairs: the second sequences, if any.
        labels: of each row.
        tokenizer: text to ids.
        settings: of the data set.
        seed: of the reverse complements.
        augment: draw them.
        classes: number of classes, for labels per base.
    """

    def __init__(
        self,
        texts: list[bytes],
        pairs: list[bytes] | None,
        labels: NDArray[Any],
        tokenizer: Tokenizer,
        settings: LabelledDataConfig,
        seed: int,
        augment: bool,
        classes: int = 0,
    ) -> None:
        self.texts, self.pairs, self.labels, self.classes = texts, pairs, labels, classes
        self.tokenizer, self.settings, self.seed, self.augment = tokenizer, settings, seed, augment
        # pairs come with their special tokens, single texts get them when a batch is assembled
        self.frame = settings.add_special and pairs is None
        flat, self.counts = self._encode(texts, pairs)
        self.flat = flat.astype(np.int32)
        self.ends = np.cumsum(self.counts)
        self.lengths = self._lengths()

    def __len__(self) -> int:
        return len(self.texts)

    def _lengths(self) -> NDArray[np.int64]:
        cfg, counts = self.settings, self.counts
        if cfg.max_len is not None and (cfg.rc_augment or cfg.rc_views) and not self.tokenizer.exact:
            index = np.arange(len(self))
            for start in range(0, len(index), 4096):  # the strands of a sequence may differ in their number of tokens
                part = index[start : start + 4096]
                counts = counts.copy()
                counts[part] = np.maximum(counts[part], self._turned(part)[1])
        lengths = counts + (len(self.tokenizer.prefix) + len(self.tokenizer.suffix) if self.frame else 0)
        if cfg.max_len is not None and cfg.truncate != "error":
            lengths = np.minimum(lengths, cfg.max_len)
        return lengths

    def _encode(self, texts: list[bytes], pairs: list[bytes] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if pairs is None:
            return self.tokenizer.flat_ids(texts)
        rows = [self.tokenizer.encode_pair(one, two)[0] for one, two in zip(texts, pairs, strict=True)]
        return np.concatenate([*rows, np.empty(0, np.int64)]), np.array([len(row) for row in rows], np.int64)

    def _turned(self, index: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64]]:
        """Ids and token counts of the reverse complements of rows."""
        mates = None if self.pairs is None else [reverse_complement(self.pairs[i]) for i in index]
        flat, counts = self._encode([reverse_complement(self.texts[i]) for i in index], mates)
        return np.split(flat, np.cumsum(counts)[:-1]), counts

    def _stored(self, index: NDArray[np.int64]) -> Rows:
        return [self.flat[self.ends[i] - self.counts[i] : self.ends[i]] for i in index]

    def _assemble(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        cfg = self.settings
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return self.tokenizer.assemble(
            np.concatenate(rows),
            counts,
            cfg.max_len,
            cfg.pad_side,
            add_special=self.frame,
            pad_to=cfg.pad_to,
            truncate=cfg.truncate,
        )

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        """ids, valid [B, L], labels, index; with rc_views also ids_rc and valid_rc [B, L']."""
        cfg, rows = self.settings, self._stored(index)
        turn = np.zeros(len(index), np.bool_)
        if self.augment and cfg.rc_augment:
            turn = coins(self.seed, epoch, index)
        other: Rows = []
        if cfg.rc_views or turn.any():
            which = np.arange(len(index)) if cfg.rc_views else np.flatnonzero(turn)
            other = [np.empty(0, np.int64)] * len(index)
            for place, row in zip(which, self._turned(index[which])[0], strict=True):
                other[place] = row
        forward = [other[i] if turn[i] else row for i, row in enumerate(rows)]
        if self.augment and cfg.frames > 1:
            forward = self._cut(index, turn, integers(self.seed, epoch, index, 0, cfg.frames - 1, stream=1))
        ids, valid = self._assemble(forward)
        labels = self._token_labels(index, turn, valid) if cfg.task == "token" else self.labels[index]
        batch = {"ids": ids, "valid": valid, "labels": labels, "index": index}
        if cfg.task == "token" and (cfg.per_base or cfg.rc_views):
            batch |= self._bases(index, turn, batch)
        if cfg.frames > 1 and not self.augment:
            batch |= self._frames(index)
        if cfg.rc_views:
            backward = [row if turn[i] else other[i] for i, row in enumerate(rows)]
            batch["ids_rc"], batch["valid_rc"] = self._assemble(backward)
            if cfg.task == "token":
                batch |= self._bases_rc(index, turn, batch)
        return batch

    def _cut(self, index: NDArray[np.int64], turn: NDArray[np.bool_], skip: NDArray[np.int64]) -> Rows:
        """Ids of rows, or of their reverse complements, without their first *skip* letters."""
        texts = [self._strand(i, t) for i, t in zip(index, turn, strict=True)]
        flat, counts = self.tokenizer.flat_ids([text[s:] or text for text, s in zip(texts, skip, strict=True)])
        return np.split(flat, np.cumsum(counts)[:-1])

    def _frames(self, index: NDArray[np.int64]) -> dict[str, Any]:
        """`ids_frames` and `valid_frames` [B, V, L]: each row in every frame, on both strands with rc_views."""
        frames, strands = self.settings.frames, 2 if self.settings.rc_views else 1
        views = frames * strands
        turn = np.tile(np.arange(views) >= frames, len(index))
        ids, valid = self._assemble(
            self._cut(index.repeat(views), turn, np.tile(np.arange(views) % frames, len(index)))
        )
        return {name: x.reshape(len(index), views, -1) for name, x in (("ids_frames", ids), ("valid_frames", valid))}

    def _frame(self) -> tuple[int, int]:
        return (len(self.tokenizer.prefix), len(self.tokenizer.suffix)) if self.frame else (0, 0)

    def _cover(self, text: bytes, valid: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each base of *text*, the place in the row of the token that covers it, and the base's place in it."""
        spans = self.tokenizer.offsets(text, add_special=False)
        return token_labels.covering(spans, len(text), valid, *self._frame(), self.settings.truncate)

    def _strand(self, i: int, turned: bool) -> bytes:
        return reverse_complement(self.texts[i]) if turned else self.texts[i]

    def _bases(self, index: NDArray[np.int64], turn: NDArray[np.bool_], batch: dict[str, Any]) -> dict[str, Any]:
        """`base`, `place` and the labels of single bases [B, N]; -1 and -100 behind the end of a shorter sequence."""
        if not self.settings.per_base:
            return {}
        found = [self._cover(self._strand(i, turn[r]), batch["valid"][r]) for r, i in enumerate(index)]
        base, place = (token_labels.stack([pair[j] for pair in found], -1) for j in (0, 1))
        rows = [self.labels[i][::-1] if turn[r] else self.labels[i] for r, i in enumerate(index)]
        labels = np.where(base >= 0, token_labels.stack(rows, token_labels.IGNORED), token_labels.IGNORED)
        return {"base": base, "place": place, "labels": labels}

    def _bases_rc(self, index: NDArray[np.int64], turn: NDArray[np.bool_], batch: dict[str, Any]) -> dict[str, Any]:
        """`base_rc` and `place_rc`: where the reverse complement's row holds the partner of each base (or token)."""
        tokens, places = [], []
        for r, i in enumerate(index):
            token, place = self._cover(self._strand(i, not turn[r]), batch["valid_rc"][r])
            token, place = token[::-1], place[::-1]  # base b of one strand is base n - 1 - b of the other
            if not self.settings.per_base:  # the partner of a token is the one that covers its middle base
                spans = self.tokenizer.offsets(self._strand(i, turn[r]), add_special=False)
                row = token[np.minimum((spans[:, 0] + spans[:, 1]) // 2, len(token) - 1)]
                token = token_labels.place([row], batch["valid"][r : r + 1], *self._frame(), self.settings.truncate)[0]
            tokens.append(token)
            places.append(place)
        base = token_labels.stack(tokens, -1)
        return (
            {"base_rc": base, "place_rc": token_labels.stack(places, -1)}
            if self.settings.per_base
            else {"base_rc": base}
        )

    def _token_labels(
        self, index: NDArray[np.int64], turn: NDArray[np.bool_], valid: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        rows = []
        for place, i in enumerate(index):
            text, labels = self.texts[i], self.labels[i]
            if turn[place]:
                text, labels = reverse_complement(text), labels[::-1]
            rows.append(token_labels.per_token(self.tokenizer, text, labels, self.classes))
        return token_labels.place(rows, valid, *self._frame(), self.settings.truncate)
