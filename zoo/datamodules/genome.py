"""Genomes for language models: windows of FASTA files, tiled or from a BED file, in three splits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules.augment import uniform
from zoo.datamodules.base import Data
from zoo.datamodules.fasta import Genome
from zoo.datamodules.intervals import Interval, read_bed, stretch
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.settings import DataConfig
from zoo.datamodules.windows import GenomeSource, Windows
from zoo.errors import ZooError

SPLITS = ("train", "val", "test")


@config
class SplitConfig:
    """Which part of the genome is for what.

    Attributes:
        by: `position` cuts every sequence at the places below, `sequence` goes by sequence names, `interval` draws
            each window or BED interval by a seeded coin, `bed` reads the fourth column of the BED file.
        train, val, test: (start, end) in each sequence, for position; numbers up to 1 are fractions of the sequence,
            above 1 bases. An empty range (end <= start) leaves the split out.
        val_names, test_names: sequences of those splits, for sequence; all others are train.
        val_fraction, test_fraction: for interval. Where windows overlap, those of val and test keep theirs: a training
            window that shares a base with one of them is left out, and a val window that shares one with test.
        seed: of the drawing, for interval; apart from the run's seed, so that runs share the split.
    """

    by: Literal["position", "sequence", "interval", "bed"] = "position"
    train: tuple[float, float] = (0.0, 0.9)
    val: tuple[float, float] = (0.9, 0.95)
    test: tuple[float, float] = (0.95, 1.0)
    val_names: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        parts = [(name, *getattr(self, name)) for name in SPLITS]
        if self.by == "position":
            for i, (name, low, high) in enumerate(parts):
                for other, start, end in parts[i + 1 :]:
                    comparable = (high > 1) == (end > 1)  # fractions and bases meet only on a sequence
                    if comparable and max(low, start) < min(high, end):
                        raise ValueError(f"split.{name} and split.{other} overlap")
        both = set(self.val_names) & set(self.test_names)
        if both:
            raise ValueError(f"sequence '{min(both)}' cannot be in val_names and test_names")
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction > 1:
            raise ValueError("val_fraction and test_fraction must not be negative, nor more than 1 together")


@config
class StageConfig:
    """One stage of a length warm-up.

    Attributes:
        length: bases a sequence; the full windows are cut into pieces of this length, so that a batch keeps its number
            of bases.
        batches: batches the stage lasts.
    """

    length: int
    batches: int


@config
class GenomeDataConfig(DataConfig):
    """A genome.

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        files: FASTA files, plain or gzip-compressed.
        intervals: BED file (sequence, start, end[, split]) of the windows; None tiles the sequences.
        length: bases a window.
        stride: bases between the starts of tiled windows; None: length.
        pad_interval: BED windows that leave their sequence are filled with '.', which the character tokenizer reads
            as unknown (official option); otherwise they are shorter and padded as the tokenizer pads.
        split: what is train, val and test.
        rc_augment: in training, each window is reverse-complemented with probability 1/2.
        shift: in training, each window is moved by up to this many bases either way, within its part.
        n_policy: `keep` N as it is, `drop` windows with more than `max_n` of them, or read N as `pad` (masked out).
        max_n: largest fraction of N with drop.
        upper: read soft-masked lower case as upper case.
        add_eos: put the end-of-sequence token behind each window.
        warmup: stages of growing length before the full one, in training.
        batch_size, eval_batch_size: windows a batch, in training and otherwise (None: the same).
        samples: training windows an epoch, each at a random place of the training part; 0 takes the tiled ones.
    """

    files: tuple[FileConfig, ...]
    intervals: FileConfig | None = None
    length: int = 1024
    stride: int | None = None
    pad_interval: bool = False
    split: SplitConfig = SplitConfig()
    rc_augment: bool = False
    shift: int = 0
    n_policy: Literal["keep", "drop", "pad"] = "keep"
    max_n: float = 0.05
    upper: bool = False
    add_eos: bool = False
    warmup: tuple[StageConfig, ...] = ()
    batch_size: int = 16
    samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError("files must name at least one FASTA file")
        if self.length < 1 or (self.stride is not None and self.stride < 1):
            raise ValueError(f"length and stride must be at least 1, got {self.length} and {self.stride}")
        if self.shift < 0 or self.samples < 0:
            raise ValueError("shift and samples must not be negative")
        if self.split.by == "bed" and self.intervals is None:
            raise ValueError("split.by=bed needs intervals")
        if self.samples and self.intervals is not None:
            raise ValueError("samples draws windows at random places and cannot go with intervals")
        for stage in self.warmup:
            if not 1 <= stage.length <= self.length or self.length % stage.length or stage.batches < 1:
                raise ValueError(f"warmup length {stage.length} must divide length {self.length}, for 1 batch or more")


class GenomeData(Data):
    """Datamodule of a genome; see `GenomeDataConfig`. Batches hold ids, valid and index; the task shifts.

    Raises (in setup):
        ZooError: a file that is missing, empty, changed or not FASTA; sequences shorter than a window (both numbers
            are named); an interval outside its sequence; a split without windows.
    """

    Config: ClassVar[type] = GenomeDataConfig
    config: GenomeDataConfig

    def _files(self) -> list[FileConfig]:
        return [*self.config.files, *([self.config.intervals] if self.config.intervals else [])]

    def _load(self) -> dict[str, Any]:
        cfg = self.config
        genome = Genome([check(file, cfg.root) for file in cfg.files])
        parts = self._from_bed(genome) if cfg.intervals else self._tiled(genome)
        sources = {}
        for split, windows in parts.items():
            if cfg.n_policy == "drop" and len(windows):
                windows = windows.take(self._few_n(genome, windows))
            if len(windows):
                train = split == "train"
                sources[split] = GenomeSource(
                    genome, windows, self.tokenizer, cfg, self.seed, train, cfg.samples if train else 0
                )
        if not sources:
            longest = max(record.length for record in genome.records.values())
            raise ZooError(
                f"no window of length {cfg.length} fits any split: the longest sequence has {longest} bases; "
                "shorten data.length or change data.split"
            )
        return sources

    def _tiled(self, genome: Genome) -> dict[str, Windows]:
        cfg = self.config
        found: dict[str, list[Windows]] = {split: [] for split in SPLITS}
        for number, record in enumerate(genome.records.values()):
            for split, low, high in self._stretches(record.name, record.length, genome):
                start = np.arange(low, high - cfg.length + 1, cfg.stride or cfg.length, dtype=np.int64)
                found[split].append(_windows(number, start, start + cfg.length, low, high))
        if cfg.split.by == "interval":
            everything = _join(found["train"])
            return self._drawn(everything)
        return {split: _join(parts) for split, parts in found.items()}

    def _stretches(self, name: str, length: int, genome: Genome) -> list[tuple[str, int, int]]:
        split = self.config.split
        if split.by == "interval":
            return [("train", 0, length)]
        if split.by == "sequence":
            for wanted in (*split.val_names, *split.test_names):
                genome.record(wanted)
            which = "val" if name in split.val_names else "test" if name in split.test_names else "train"
            return [(which, 0, length)]
        parts = [(part, *_range(getattr(split, part), length)) for part in SPLITS]
        for i, (part, low, high) in enumerate(parts):
            for other, start, end in parts[i + 1 :]:
                if max(low, start) < min(high, end):
                    raise ZooError(f"data.split.{part} and data.split.{other} overlap in sequence '{name}'")
        return parts

    def _from_bed(self, genome: Genome) -> dict[str, Windows]:
        cfg = self.config
        assert cfg.intervals is not None
        number = {name: i for i, name in enumerate(genome.records)}
        found: dict[str, list[Windows]] = {split: [] for split in SPLITS}
        for interval in read_bed(check(cfg.intervals, cfg.root), cfg.split.by == "bed"):
            record = genome.record(interval.name)
            if not 0 <= interval.start < interval.end <= record.length:
                raise ZooError(
                    f"{interval.place}: {interval.start}-{interval.end} lies outside '{interval.name}', which has "
                    f"{record.length} bases"
                )
            start, end = stretch(interval.start, interval.end, cfg.length)
            edges = np.array([start]), np.array([end])
            found[self._split_of(interval)].append(_windows(number[interval.name], *edges, 0, record.length))
        if cfg.split.by == "interval":
            return self._drawn(_join(found["train"]))
        parts = {split: _join(windows) for split, windows in found.items()}
        held = _join([parts["val"], parts["test"]])
        return {**parts, "train": _fenced(parts["train"], held)}

    def _split_of(self, interval: Interval) -> str:
        split = self.config.split
        if split.by == "bed":
            return interval.split
        if split.by == "sequence":
            return (
                "val" if interval.name in split.val_names else "test" if interval.name in split.test_names else "train"
            )
        if split.by == "position":
            raise ZooError("data.split.by=position is for tiled windows; use bed, sequence or interval with intervals")
        return "train"

    def _drawn(self, windows: Windows) -> dict[str, Windows]:
        split = self.config.split
        chance = uniform(split.seed, 0, np.arange(len(windows)), stream=4)
        test, val = chance < split.test_fraction, chance >= 1 - split.val_fraction
        # neighbours may be of another split, so a window may not be shifted
        fixed = Windows(windows.sequence, windows.start, windows.end, windows.start, windows.end)
        parts = {"train": fixed.take(~test & ~val), "val": fixed.take(val & ~test), "test": fixed.take(test)}
        parts["val"] = parts["val"].take(~_touching(parts["val"], parts["test"]))
        held = _join([parts["val"], parts["test"]])
        return {**parts, "train": parts["train"].take(~_touching(parts["train"], held))}

    def _few_n(self, genome: Genome, windows: Windows) -> NDArray[np.bool_]:
        names = list(genome.records)
        keep = np.empty(len(windows), np.bool_)
        for i in range(len(windows)):
            letters = genome.read(names[windows.sequence[i]], int(windows.start[i]), int(windows.end[i]))
            keep[i] = np.count_nonzero((letters | 32) == ord("n")) <= self.config.max_n * len(letters)
        return keep

    @property
    def max_tokens(self) -> int:
        """Tokens of a full window; for BPE the number of bases, which no window exceeds."""
        per = getattr(self.tokenizer, "k", 1)
        return -(-self.config.length // per) + self.config.add_eos


def _range(part: tuple[float, float], length: int) -> tuple[int, int]:
    low, high = (int(value) if value > 1 else round(value * length) for value in part)
    return min(low, length), min(high, length)


def _around(windows: Windows, held: Windows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each window the end of the last held-out one that begins at or before its start, and the start of the next
    one after that; windows of other sequences count as infinitely far."""
    before = np.full(len(windows), -(2**62), np.int64)
    behind = np.full(len(windows), 2**62, np.int64)
    for number in np.unique(held.sequence):
        mine, theirs = windows.sequence == number, held.sequence == number
        order = np.argsort(held.start[theirs], kind="stable")
        starts = held.start[theirs][order]
        ends = np.maximum.accumulate(held.end[theirs][order])
        place = np.searchsorted(starts, windows.start[mine], "right")
        before[mine] = np.concatenate([[-(2**62)], ends])[place]
        behind[mine] = np.concatenate([starts, [2**62]])[place]
    return before, behind


def _touching(windows: Windows, held: Windows) -> NDArray[np.bool_]:
    """Which windows share a base with a held-out one."""
    before, behind = _around(windows, held)
    return (before > windows.start) | (behind < windows.end)


def _fenced(windows: Windows, held: Windows) -> Windows:
    """The windows with room to be shifted that ends where a held-out window begins.

    Windows that overlap one from the start stay: their split was written down by hand.
    """
    before, behind = _around(windows, held)
    low = np.minimum(np.maximum(windows.low, before), windows.start)
    high = np.maximum(np.minimum(windows.high, behind), windows.end)
    return Windows(windows.sequence, windows.start, windows.end, low, high)


def _windows(number: int, start: NDArray[np.int64], end: NDArray[np.int64], low: int, high: int) -> Windows:
    same = np.ones(len(start), np.int64)
    return Windows(same * number, start.astype(np.int64), end.astype(np.int64), same * low, same * high)


def _join(parts: list[Windows]) -> Windows:
    names = ("sequence", "start", "end", "low", "high")
    empty = np.empty(0, np.int64)
    return Windows(*(np.concatenate([empty, *(getattr(part, name) for part in parts)]) for name in names))
