"""What every datamodule offers: loaders that resume, the files it reads, and what its labels are."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule

from zoo.datamodules.loader import ResumableLoader, Source
from zoo.datamodules.manifest import FileConfig, record
from zoo.errors import ZooError
from zoo.tokenizers.base import Tokenizer

Split = Literal["train", "val", "test"]
TaskKind = Literal["lm", "multiclass", "multilabel", "regression", "token", "image"]


class Data(LightningDataModule):
    """A LightningDataModule whose `setup` fills `sources`; loaders, state and records come from here.

    Attributes:
        config: the frozen config it was built from.
        tokenizer: text to ids.
        seed: of order and augmentation.
        task_kind: what the labels are; `lm` has none, `token` has one for each token (-100: none).
        num_outputs: logits a head needs for them (0 for lm).
        classes: names of the classes or outputs.
        class_counts: training samples of each class (of each positive label), or None.
        sources: split -> samples, after `setup`.
    """

    Config: ClassVar[type]
    needs_tokenizer: ClassVar[bool] = True
    task_kind: TaskKind = "lm"

    def __init__(self, config: Any, tokenizer: Tokenizer | None, seed: int = 0) -> None:
        super().__init__()
        if tokenizer is None and self.needs_tokenizer:
            raise ZooError("this data set holds text, so the recipe needs a tokenizer")
        self.config, self.seed = config, seed
        self.tokenizer: Tokenizer = tokenizer  # type: ignore[assignment]
        self.sources: dict[str, Source] = {}
        self._train: ResumableLoader | None = None
        self._pending: dict[str, Any] | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = False

    def _load(self) -> dict[str, Source]:
        """Read and check everything; split -> samples."""
        raise NotImplementedError

    def _files(self) -> list[FileConfig]:
        """The files of the data set, in reading order."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Check the manifest and read the data, once."""
        if not self.sources:
            self.sources = self._load()

    @property
    def num_outputs(self) -> int:
        """Logits a head needs."""
        return 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or outputs."""
        return ()

    @property
    def class_counts(self) -> NDArray[np.int64] | None:
        """Training samples of each class."""
        return None

    @property
    def max_tokens(self) -> int:
        """Length of the longest row of ids that a loader can give."""
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        """What else run.json says of the data."""
        return {}

    def files(self) -> list[dict[str, str]]:
        """`{"path", "sha256"}` of each file, as it is on disk.

        Raises:
            ZooError: a file is missing.
        """
        return [record(file, self.config.root) for file in self._files()]

    def loader(self, split: Split, *, train: bool | None = None) -> ResumableLoader:
        """Batches of a split; *train* (default: split is train) shuffles, drops the last batch and augments.

        Raises:
            ZooError: the data set has no such split.
        """
        self.setup()
        if split not in self.sources:
            raise ZooError(f"the data set has no {split} split (it has: {', '.join(self.sources) or 'none'})")
        source = self.sources[split]
        training = split == "train" if train is None else train
        if getattr(source, "augment", training) != training:
            source = copy.copy(source)
            source.augment = training  # type: ignore[attr-defined]
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        size = self.config.batch_size if training else (self.config.eval_batch_size or self.config.batch_size)
        return ResumableLoader(
            source,
            size,
            seed=self.seed,
            shuffle=training,
            drop_last=training and len(source) >= size * world,
            bucket=self.config.bucket,
            lengths=getattr(source, "lengths", None),
            rank=rank,
            world=world,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented, resumable."""
        self._train = self.loader("train")
        if self._pending is not None:
            self._train.load_state_dict(self._pending)
            self._pending = None
        return self._train

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The development split, in order; an empty list where there is none."""
        self.setup()
        return self.loader("val") if "val" in self.sources else []

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The test split, in order; an empty list where there is none."""
        self.setup()
        return self.loader("test") if "test" in self.sources else []

    def predict_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The test split, in order."""
        return self.test_dataloader()

    # Lightning restores the loader's own state only when it resumes inside an epoch; this one also serves a
    # checkpoint that was written between two epochs.
    def state_dict(self) -> dict[str, Any]:
        """The training order's state, for a checkpoint."""
        return {"train": self._train.state_dict()} if self._train is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the training order of a checkpoint."""
        state = state_dict.get("train")
        if state is not None and self._train is not None:
            self._train.load_state_dict(state)
        else:
            self._pending = state
