"""Windows of a genome: read, shifted, reverse-complemented and tokenized a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules.augment import coins, integers, reverse_complement_rows, uniform
from zoo.datamodules.fasta import Genome
from zoo.errors import ZooError
from zoo.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from zoo.datamodules.genome import GenomeDataConfig

PAD = ord(".")  # what the official code writes where an interval leaves its chromosome; no tokenizer's letter


@dataclass(frozen=True)
class Windows:
    """Windows as arrays: sequence number, start, end, and the part [low, high) that a shifted one may not leave."""

    sequence: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def take(self, keep: NDArray[Any]) -> Windows:
        """The marked or numbered ones."""
        return Windows(self.sequence[keep], self.start[keep], self.end[keep], self.low[keep], self.high[keep])


class GenomeSource:
    """Windows of one split, read and tokenized a batch at a time.

    Attributes:
        windows: where they are.
        augment: shift, reverse-complement and warm up.
    """

    def __init__(
        self,
        genome: Genome,
        windows: Windows,
        tokenizer: Tokenizer,
        settings: GenomeDataConfig,
        seed: int,
        augment: bool,
        size: int = 0,
    ) -> None:
        self.genome, self.windows, self.tokenizer = genome, windows, tokenizer
        self.settings, self.seed, self.augment, self.size = settings, seed, augment, size
        self.names = list(genome.records)
        self.eos = tokenizer.special.get("eos", tokenizer.special.get("sep"))
        if settings.add_eos and self.eos is None:
            raise ZooError(f"data.add_eos needs a tokenizer with an end token; '{tokenizer.name}' has none")

    def __len__(self) -> int:
        return self.size if self.augment and self.size else len(self.windows)

    def bases(self, index: NDArray[np.int64], epoch: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Letters of the samples *index*, uint8 [B, length] filled with '.', and how many of each row are real."""
        cfg, w = self.settings, self.windows
        if self.augment and self.size:
            row = self._anywhere(index, epoch)
            sequence, start, end = row.sequence, row.start, row.end
        else:
            sequence, start, end = w.sequence[index], w.start[index], w.end[index]
            if self.augment and cfg.shift:
                by = integers(self.seed, epoch, index, -cfg.shift, cfg.shift, stream=1)
                by = np.maximum(np.minimum(by, w.high[index] - end), w.low[index] - start)
                start, end = start + by, end + by
        out = np.full((len(index), cfg.length), PAD, np.uint8)
        real = np.empty(len(index), np.int64)
        for i in range(len(index)):
            record = self.genome.records[self.names[sequence[i]]]
            low, high = max(int(start[i]), 0), min(int(end[i]), record.length)
            place = low - int(start[i]) if cfg.pad_interval else 0
            out[i, place : place + high - low] = self.genome.slice(record, low, high)
            real[i] = cfg.length if cfg.pad_interval else high - low
        if cfg.upper:
            lower = (out >= 97) & (out <= 122)
            out = np.where(lower, out - 32, out).astype(np.uint8)
        return out, real

    def _anywhere(self, index: NDArray[np.int64], epoch: int) -> Windows:
        """Windows at random places, each stretch of the training part as likely as it is long."""
        cfg, w = self.settings, self.windows
        stretches, first = np.unique(np.stack([w.sequence, w.low, w.high]), axis=1, return_index=True)
        room = stretches[2] - stretches[1] - cfg.length + 1
        edges = np.cumsum(room)
        place = (uniform(self.seed, epoch, index, stream=3) * edges[-1]).astype(np.int64)
        which = np.searchsorted(edges, place, "right")
        start = stretches[1][which] + place - (edges - room)[which]
        row = w.take(first[which])
        return Windows(row.sequence, start, start + cfg.length, row.low, row.high)

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        """ids, valid [B, L] and index; with a warm-up [B * pieces, shorter L]."""
        cfg = self.settings
        windows, real = self.bases(index, epoch)
        whole = bool((real == cfg.length).all())
        if self.augment and cfg.rc_augment:
            turned = coins(self.seed, epoch, index, stream=2)
            if whole:
                windows = reverse_complement_rows(windows, turned)
            else:
                for i in np.flatnonzero(turned):
                    part = windows[i : i + 1, : real[i]]
                    windows[i, : real[i]] = reverse_complement_rows(part, np.ones(1, np.bool_))[0]
        piece = self.piece(step)
        if piece < cfg.length:
            windows, real, row = _cut(windows, real, piece)
            index = index[row]
        if whole:
            ids, valid = self.tokenizer.encode_windows(windows)
        else:
            texts = [row[:n].tobytes() for row, n in zip(windows, real, strict=True)]
            ids, valid = self.tokenizer.encode_batch(texts, add_special=False)
        if cfg.n_policy == "pad":
            ids, valid = self._mask_n(windows, ids, valid, whole)
        if cfg.add_eos:
            ids, valid = self._with_eos(ids, valid)
        return {"ids": ids, "valid": valid, "index": index}

    def piece(self, step: int) -> int:
        """Bases a sequence at batch *step* of training."""
        if self.augment:
            for stage in self.settings.warmup:
                if step < stage.batches:
                    return stage.length
                step -= stage.batches
        return self.settings.length

    def _mask_n(
        self, windows: NDArray[np.uint8], ids: NDArray[np.int64], valid: NDArray[np.bool_], whole: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not self.tokenizer.exact or not whole or ids.shape != windows.shape:
            raise ZooError("data.n_policy=pad needs a character tokenizer and windows inside their sequences")
        unknown = (windows == ord("N")) | (windows == ord("n"))
        return np.where(unknown, self.tokenizer.special["pad"], ids), valid & ~unknown

    def _with_eos(
        self, ids: NDArray[np.int64], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The end token right behind each row's last token (behind the padding's place when padded on the right)."""
        rows, width = ids.shape
        out = np.full((rows, width + 1), self.tokenizer.special.get("pad", 0), np.int64)
        mask = np.zeros((rows, width + 1), np.bool_)
        out[:, :width], mask[:, :width] = ids, valid
        last = width - valid[:, ::-1].argmax(1)  # one past the last real token
        out[np.arange(rows), last] = self.eos
        mask[np.arange(rows), last] = True
        return out, mask


def _cut(
    windows: NDArray[np.uint8], real: NDArray[np.int64], piece: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """[B, L] to [B * L / piece, piece], the real letters of each piece and the row it came from; empty ones go."""
    count = windows.shape[1] // piece
    left = np.clip(real[:, None] - piece * np.arange(count), 0, piece).reshape(-1)
    row = np.repeat(np.arange(len(windows)), count)
    keep = left > 0
    return windows.reshape(-1, piece)[keep], left[keep], row[keep]
