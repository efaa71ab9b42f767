"""Labelled sequences: classes, several labels, numbers, pairs; from CSV, TSV or FASTA files."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules import labels as read
from zoo.datamodules import token_labels as per_base
from zoo.datamodules.base import Data
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.rows import LabelledSource
from zoo.datamodules.settings import DataConfig
from zoo.datamodules.table import Table, read_table
from zoo.errors import ZooError
from zoo.tokenizers.base import Tokenizer


@config
class LabelledDataConfig(DataConfig):
    """A set of labelled sequences.

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: the files. Without val, `val_fraction` of train is held out; without test and with `folds`,
            train is cut into folds.
        format: of the files; `auto` goes by their names. `folder` is a folder with one folder for each class, which
            holds one sequence a file (the layout of Genomic Benchmarks).
        separator: in FASTA headers, between name and label.
        sequence, sequence2: column of the sequence, and of the second one of a pair.
        label: column or columns of the labels.
        task: what the labels are. `token` is one letter for every base, in a string as long as the sequence ('.': no
            label); a token's label is the commonest of its bases.
        per_base: with `token`: labels and predictions are those of single bases, whatever tokens they lie in; batches
            then hold `base` (the token that covers each base) and `place` (where in it), and labels are [B, bases].
        classes: names of the classes, or of the outputs of multilabel; () takes them from the training labels.
        val_fraction: part of train held out for val when there is no val file. Neither it nor folds part equal
            sequences (or pairs).
        folds, fold: cross-validation when there is no test file: fold `fold` is test and the next one val.
        max_len: most tokens a row may have, special tokens included; None: no limit.
        truncate: what happens to longer rows: `error`, or tokens are cut from that side.
        pad_side: side padded; None: the tokenizer's own.
        pad_to: pad every batch to this many tokens; None: to its longest row.
        add_special: add the tokenizer's special tokens.
        upper: read soft-masked lower case as upper case.
        rc_augment: in training, each sequence is reverse-complemented with probability 1/2 (both of a pair).
        rc_views: batches also hold `ids_rc` and `valid_rc`, the reverse complement of each row, for averaging over
            both strands at test time and for post-hoc conjoining.
        frames: k for words of k letters: in training each sequence loses 0 to k - 1 of its first letters, drawn anew
            every epoch, so that its words are cut in every frame; otherwise batches also hold `ids_frames` and
            `valid_frames` [B, frames, L], the row in each frame (with rc_views also those of the other strand, in
            twice as many), whose predictions the task averages.
        class_weights: offer `class_weights` (inverse class frequency, mean 1 over the samples) to the task.
        limit: use only this many training rows, the first of a seeded permutation; 0 uses all.
        batch_size, eval_batch_size: rows a batch, in training and otherwise (None: the same).
        bucket: group rows of similar length, looking this many batches ahead; 0: no.
    """

    train: FileConfig | None = None
    val: FileConfig | None = None
    test: FileConfig | None = None
    format: Literal["auto", "csv", "tsv", "fasta", "folder"] = "auto"
    separator: str = "|"
    sequence: str = "sequence"
    sequence2: str | None = None
    label: str | tuple[str, ...] = "label"
    task: Literal["multiclass", "multilabel", "regression", "token"] = "multiclass"
    per_base: bool = False
    classes: tuple[str, ...] = ()
    val_fraction: float = 0.0
    folds: int = 0
    fold: int = 0
    max_len: int | None = None
    truncate: Literal["error", "left", "right"] = "error"
    pad_side: Literal["left", "right"] | None = None
    pad_to: int | None = None
    add_special: bool = True
    upper: bool = False
    rc_augment: bool = False
    rc_views: bool = False
    frames: int = 1
    class_weights: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is None and self.val is None and self.test is None:
            raise ValueError("a labelled data set needs at least one of train, val and test")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")
        if self.folds and not (self.folds >= 3 and 0 <= self.fold < self.folds):
            raise ValueError(f"folds must be at least 3 and fold below it, got folds={self.folds}, fold={self.fold}")
        if self.folds and (self.test is not None or self.val is not None):
            raise ValueError("folds are for data sets that have a train file only")
        if self.task in ("multiclass", "token") and not isinstance(self.label, str):
            raise ValueError(f"label must be one column when task is {self.task}")
        if self.task == "token" and self.sequence2 is not None:
            raise ValueError("labels per base are for single sequences, not for pairs")
        if self.per_base and self.task != "token":
            raise ValueError(f"per_base is for labels of the kind 'token', not '{self.task}'")
        if self.frames < 1 or (self.frames > 1 and (self.task == "token" or self.sequence2 is not None)):
            raise ValueError("frames must be at least 1, and 1 for labels of the kind 'token' and for pairs")
        if self.limit < 0 or (self.max_len is not None and self.max_len < 1):
            raise ValueError("limit must not be negative, and max_len at least 1")


_HELD = {"train": "a val split", "val": "a val split", "test": "a test split"}


class LabelledData(Data):
    """Datamodule of labelled sequences; see `LabelledDataConfig`.

    Raises (in setup):
        ZooError: a file that is missing, empty or changed; a column that is not there; a label that is no class; a
            sequence that is empty or longer than max_len (both numbers are named).
    """

    Config: ClassVar[type] = LabelledDataConfig
    config: LabelledDataConfig

    def __init__(self, config: LabelledDataConfig, tokenizer: Tokenizer | None, seed: int = 0) -> None:
        super().__init__(config, tokenizer, seed)
        self.task_kind = config.task
        self._classes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The label columns."""
        return (self.config.label,) if isinstance(self.config.label, str) else self.config.label

    def _files(self) -> list[FileConfig]:
        return [file for file in (self.config.train, self.config.val, self.config.test) if file is not None]

    def _load(self) -> dict[str, Any]:
        cfg = self.config
        tables = {
            split: read_table(check(file, cfg.root, folder=cfg.format == "folder"), cfg.format, cfg.separator)
            for split in ("train", "val", "test")
            if (file := getattr(cfg, split)) is not None
        }
        first = next(iter(tables.values()))
        self._classes = self._names(first)
        sources: dict[str, Any] = {}
        for split, table in tables.items():
            rows = np.arange(len(table))
            labels = self._labels(table)
            if split == "train":
                for name, part in self._parts(table, labels).items():
                    sources[name] = self._source(table, labels, part, name == "train")
            else:
                sources[split] = self._source(table, labels, rows, False)
        if "train" in sources:
            self._check_classes(sources["train"].labels)
        return sources

    def _names(self, table: Table) -> tuple[str, ...]:
        cfg = self.config
        if cfg.task == "multiclass":
            return read.class_names(table, self.columns[0], cfg.classes)
        if cfg.task == "token":
            return per_base.letters(table.column(self.columns[0], "label"), cfg.classes)
        if cfg.classes and len(self.columns) > 1 and len(cfg.classes) != len(self.columns):
            raise ZooError(f"data.classes names {len(cfg.classes)} outputs but data.label {len(self.columns)} columns")
        return tuple(cfg.classes) or self.columns

    def _labels(self, table: Table) -> NDArray[Any]:
        if self.config.task == "multiclass":
            return read.multiclass(table, self.columns[0], self._classes)
        if self.config.task == "token":
            return per_base.per_base(table, self.columns[0], self.config.sequence, self._classes)
        if self.config.task == "multilabel":
            return read.multilabel(table, self.columns, self._classes)
        return read.regression(table, self.columns)

    def _parts(self, table: Table, labels: NDArray[Any]) -> dict[str, NDArray[np.int64]]:
        """Rows of the training file that go to train and, where no file holds them, to val and test."""
        cfg, rows = self.config, np.arange(len(labels))
        columns = [cfg.sequence, *([cfg.sequence2] if cfg.sequence2 else [])]
        cells = zip(*(table.column(column, "sequence") for column in columns), strict=True)
        texts = ["|".join(row).upper() for row in cells]
        parts: dict[str, NDArray[np.int64]] = {"train": rows}
        if cfg.folds:
            if len(labels) < cfg.folds:
                raise ZooError(f"{len(labels)} rows cannot be cut into {cfg.folds} folds")
            fold = read.folds(labels, cfg.folds, 0, texts)  # seed 0: the folds stay while the run's seed varies
            after = (cfg.fold + 1) % cfg.folds
            held = (fold == cfg.fold) | (fold == after)
            parts = {"train": rows[~held], "val": rows[fold == after], "test": rows[fold == cfg.fold]}
        elif cfg.val is None and cfg.val_fraction:
            held = read.held_out(texts, cfg.val_fraction)
            parts = {"train": rows[~held], "val": rows[held]}
        if cfg.limit:
            order = np.random.default_rng([self.seed & (2**63 - 1), 1]).permutation(parts["train"])
            parts["train"] = np.sort(order[: cfg.limit])
        for name, part in parts.items():
            if not len(part):
                raise ZooError(
                    f"'{table.path}' has {len(labels)} rows, too few different ones to hold out {_HELD[name]}"
                )
        return parts

    def _source(self, table: Table, labels: NDArray[Any], rows: NDArray[np.int64], augment: bool) -> LabelledSource:
        cfg = self.config
        texts = self._texts(table, cfg.sequence, "sequence", rows)
        pairs = self._texts(table, cfg.sequence2, "sequence2", rows) if cfg.sequence2 else None
        classes = len(self._classes)
        source = LabelledSource(texts, pairs, labels[rows], self.tokenizer, cfg, self.seed, augment, classes)
        if cfg.max_len is not None and len(source) and int(source.lengths.max()) > cfg.max_len:
            worst = int(source.lengths.argmax())
            raise ZooError(
                f"{table.place(int(rows[worst]))}: the sequence has {int(source.lengths[worst])} tokens, more than "
                f"data.max_len={cfg.max_len}; raise max_len or set data.truncate to left or right"
            )
        return source

    def _texts(self, table: Table, column: str, what: str, rows: NDArray[np.int64]) -> list[bytes]:
        values = table.column(column, what)
        texts = []
        for row in rows:
            text = "".join(values[row].split())
            if not text:
                raise ZooError(f"{table.place(int(row))}: the column '{column}' is empty")
            texts.append((text.upper() if self.config.upper else text).encode("latin-1", "replace"))
        return texts

    def _check_classes(self, labels: NDArray[Any]) -> None:
        if self.config.task in ("multiclass", "token") and len(self._classes) < 2:
            raise ZooError(f"the training labels hold one class only ('{''.join(self._classes)}')")

    def facts(self) -> dict[str, str]:
        """Sequences (or pairs) that stand in more than one split, where published files share some."""
        self.setup()
        rows = {}
        for split, source in self.sources.items():
            columns = [source.texts, *([source.pairs] if source.pairs else [])]  # type: ignore[attr-defined]
            rows[split] = [b"|".join(row).upper() for row in zip(*columns, strict=True)]
        known: dict[bytes, str] = {}
        found = []
        for split, texts in rows.items():
            where = Counter(known[text] for text in texts if text in known)
            found += [
                f"{count} of {len(texts)} {split} sequences stand in {other} too" for other, count in where.items()
            ]
            known = {**dict.fromkeys(texts, split), **known}
        return {"shared": "; ".join(found)} if found else {}

    @property
    def num_outputs(self) -> int:
        self.setup()
        return len(self._classes)

    @property
    def classes(self) -> tuple[str, ...]:
        self.setup()
        return self._classes

    @property
    def class_counts(self) -> NDArray[np.int64] | None:
        self.setup()
        if "train" not in self.sources or self.config.task == "regression":
            return None
        labels = self.sources["train"].labels  # type: ignore[attr-defined]
        if self.config.task == "multilabel":
            return labels.sum(0).astype(np.int64)
        if self.config.task == "token":
            every = np.concatenate(list(labels))
            return np.bincount(every[every >= 0], minlength=len(self._classes))
        return np.bincount(labels, minlength=len(self._classes))

    @property
    def class_weights(self) -> NDArray[np.float32] | None:
        """Weight of each class in the loss, inverse to its frequency; None unless the config asks for them."""
        counts = self.class_counts
        if not self.config.class_weights or counts is None or self.config.task == "multilabel":
            return None
        return (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)

    @property
    def max_tokens(self) -> int:
        self.setup()
        return max(int(source.lengths.max()) for source in self.sources.values())  # type: ignore[attr-defined]
