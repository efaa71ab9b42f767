"""Unlabelled sequences of many lengths (reads, contigs, transcripts) for language models, packed or padded."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.settings import DataConfig
from zoo.datamodules.table import read_sequences
from zoo.errors import ZooError
from zoo.tokenizers.base import Tokenizer


@config
class ReadsDataConfig(DataConfig):
    """A set of sequences.

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: FASTA files, or CSV and TSV files with a column `sequence`, plain or gzip-compressed.
        sequence: that column's name.
        length: tokens a row, special tokens included.
        pack: fill each row with several whole sequences (METAGENE-1's context stuffing); batches then hold `segment`,
            the number of each token's sequence in its row (-1: padding), so that attention stays within sequences.
            Otherwise every sequence is a row of its own.
        longer: sequences longer than `length`: cut into pieces (`split`), left out (`drop`) or an error.
        add_special: add the tokenizer's special tokens to each sequence.
        upper: read soft-masked lower case as upper case.
        val_fraction: part of train held out for val when there is no val file.
        batch_size, eval_batch_size: rows a batch, in training and otherwise (None: the same).
        bucket: without pack, group rows of similar length, looking this many batches ahead; 0: no.
    """

    train: FileConfig | None = None
    val: FileConfig | None = None
    test: FileConfig | None = None
    sequence: str = "sequence"
    length: int = 512
    pack: bool = True
    longer: Literal["split", "drop", "error"] = "error"
    add_special: bool = True
    upper: bool = False
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is None and self.val is None and self.test is None:
            raise ValueError("a data set of reads needs at least one of train, val and test")
        if self.length < 8:
            raise ValueError(f"length must be at least 8, got {self.length}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")


class ReadsSource:
    """Rows of one or, packed, several tokenized sequences.

    Attributes:
        lengths: real tokens of each row, int64 [N].
        fill: part of the rows' places that hold real tokens, were every row `length` long.
    """

    def __init__(
        self,
        flat: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokenizer: Tokenizer,
        settings: ReadsDataConfig,
        seed: int,
    ) -> None:
        self.flat, self.tokenizer, self.settings = flat.astype(np.int32), tokenizer, settings
        self.counts, self.ends = counts, np.cumsum(counts)
        self.extra = len(tokenizer.prefix) + len(tokenizer.suffix) if settings.add_special else 0
        order = np.random.default_rng([seed & (2**63 - 1), len(counts)]).permutation(len(counts))
        if settings.pack:
            self.rows = pack(counts + self.extra, settings.length, order)
        else:
            self.rows = [np.array([i]) for i in range(len(counts))]
        self.lengths = np.array([int((counts[row] + self.extra).sum()) for row in self.rows], np.int64)
        self.fill = float(self.lengths.sum()) / max(1, settings.length * len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        """ids, valid [B, L] and index; packed also segment [B, L]."""
        cfg, tokenizer = self.settings, self.tokenizer
        if not cfg.pack:
            rows = [self.flat[self.ends[i] - self.counts[i] : self.ends[i]] for i in index]
            ids, valid = tokenizer.assemble(
                np.concatenate(rows), self.counts[index], pad_side="right", add_special=cfg.add_special
            )
            return {"ids": ids, "valid": valid, "index": index}
        ids = np.full((len(index), cfg.length), tokenizer.special.get("pad", 0), np.int64)
        segment = np.full((len(index), cfg.length), -1, np.int64)
        before, behind = (tokenizer.prefix, tokenizer.suffix) if cfg.add_special else ((), ())
        for b, number in enumerate(index):
            at = 0
            for s, i in enumerate(self.rows[number]):
                end = at + int(self.counts[i]) + self.extra
                ids[b, at : at + len(before)], ids[b, end - len(behind) : end] = before, behind
                ids[b, at + len(before) : end - len(behind)] = self.flat[self.ends[i] - self.counts[i] : self.ends[i]]
                segment[b, at:end] = s
                at = end
        return {"ids": ids, "valid": segment >= 0, "segment": segment, "index": index}


class ReadsData(Data):
    """Datamodule of unlabelled sequences; see `ReadsDataConfig`.

    Raises (in setup):
        ZooError: a file that is missing, empty, changed or unreadable; a sequence that does not fit `length` (both
            numbers are named) unless `longer` says what to do.
    """

    Config: ClassVar[type] = ReadsDataConfig
    config: ReadsDataConfig

    def _files(self) -> list[FileConfig]:
        return [file for file in (self.config.train, self.config.val, self.config.test) if file is not None]

    def _load(self) -> dict[str, Any]:
        cfg = self.config
        sources: dict[str, Any] = {}
        for split in ("train", "val", "test"):
            file: FileConfig | None = getattr(cfg, split)
            if file is None:
                continue
            path = check(file, cfg.root)
            texts = read_sequences(path, cfg.sequence)
            if cfg.upper:
                texts = [text.upper() for text in texts]
            parts = {split: np.arange(len(texts))}
            if split == "train" and cfg.val is None and cfg.val_fraction:
                order = np.random.default_rng([0, len(texts)]).permutation(len(texts))
                size = max(1, round(cfg.val_fraction * len(texts)))
                parts = {"train": np.sort(order[size:]), "val": np.sort(order[:size])}
            for name, rows in parts.items():
                flat, counts = self._fitted(*self.tokenizer.flat_ids([texts[i] for i in rows]), str(path))
                sources[name] = ReadsSource(flat, counts, self.tokenizer, cfg, self.seed)
        return sources

    def _fitted(
        self, flat: NDArray[np.int64], counts: NDArray[np.int64], path: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of the sequences that fit a row, the longer ones split or left out."""
        cfg = self.config
        room = cfg.length - (len(self.tokenizer.prefix) + len(self.tokenizer.suffix) if cfg.add_special else 0)
        over = counts > room
        if not over.any():
            return flat, counts
        if cfg.longer == "error":
            row = int(over.argmax())
            raise ZooError(
                f"'{path}' sequence {row + 1} has {int(counts[row])} tokens, more than the {room} that data.length="
                f"{cfg.length} leaves for them; raise length or set data.longer to split or drop"
            )
        if cfg.longer == "drop":
            if over.all():
                raise ZooError(f"every sequence of '{path}' is longer than data.length={cfg.length} allows")
            return flat[np.repeat(~over, counts)], counts[~over]
        pieces = -(-counts // room)
        out = np.full(int(pieces.sum()), room, np.int64)
        out[np.cumsum(pieces) - 1] = counts - (pieces - 1) * room
        return flat, out

    @property
    def max_tokens(self) -> int:
        return self.config.length


def pack(counts: NDArray[np.int64], length: int, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of whole sequences that together have at most *length* tokens, filled one after the other in *order*."""
    rows: list[NDArray[np.int64]] = []
    row: list[int] = []
    room = length
    for i in order.tolist():
        if counts[i] > room and row:
            rows.append(np.array(row))
            row, room = [], length
        row.append(i)
        room -= int(counts[i])
    if row:
        rows.append(np.array(row))
    return rows
