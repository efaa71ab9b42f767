"""Clips that were tokenized beforehand: safetensors files of ids [N, T, H, W], as `zoo tokenize` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.settings import SplitFilesConfig
from zoo.datamodules.shards import expand
from zoo.datamodules.token_cache import read_tokens
from zoo.errors import ZooError


@config
class ClipTokensConfig(SplitFilesConfig):
    """Files with `ids` [N, T, H, W] and, where clips have classes, `labels` [N].

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: the files; a path may stand for many (`ids-{000..011}.safetensors`, or with `*` and `?`).
        batch_size, eval_batch_size: clips a batch, in training and otherwise (None: the same).
    """

    batch_size: int = 16


@dataclass(frozen=True)
class ClipCache:
    """One or several token files.

    Attributes:
        ids: [N, T, H, W] int64.
        labels: [N] int64, -1 where a clip has none.
        vocab: number of codes; tokenizer: the artifact that made them; classes: names of the labels.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    vocab: int
    tokenizer: str
    classes: tuple[str, ...]


def read_clips(files: list[Path]) -> ClipCache:
    """Token files as one.

    Raises:
        ZooError: not such a file, ids outside the vocabulary, or files of different tokenizers or sizes.
    """
    ids, labels, facts = read_tokens(files, "those of clips, [N, T, H, W]", (4,))
    if len(set(facts)) > 1 or len({rows.shape[1:] for rows in ids}) > 1:
        raise ZooError(f"'{files[0]}' and the files after it come from different tokenizers or clips of other sizes")
    return ClipCache(np.concatenate(ids), np.concatenate(labels).astype(np.int64), *facts[0])


class ClipTokenSource:
    """Batches ids [B, T, H, W], labels [B], index [B]."""

    def __init__(self, cache: ClipCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache.ids)

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        return {"ids": self.cache.ids[index], "labels": self.cache.labels[index], "index": index}


class ClipTokens(Data):
    """Datamodule of cached clips; see `ClipTokensConfig`.

    Raises (in setup):
        ZooError: a file is missing, changed or no token file of clips; splits of different tokenizers.
    """

    Config: ClassVar[type] = ClipTokensConfig
    config: ClipTokensConfig
    needs_tokenizer: ClassVar[bool] = False
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("next_block",)
    modality: ClassVar[str] = "video"

    def __init__(self, config: ClipTokensConfig, tokenizer: Any = None, seed: int = 0) -> None:
        super().__init__(config, None, seed)
        self.caches: dict[str, ClipCache] = {}

    def _files(self) -> list[FileConfig]:
        cfg = self.config
        return [one for files in (cfg.train, cfg.val, cfg.test) for file in files for one in expand(file, cfg.root)]

    def _load(self) -> dict[str, Any]:
        cfg = self.config
        for split in ("train", "val", "test"):
            files = [check(one, cfg.root) for file in getattr(cfg, split) for one in expand(file, cfg.root)]
            if files:
                self.caches[split] = read_clips(files)
        first = self.first
        for split, cache in self.caches.items():
            if cache.ids.shape[1:] != first.ids.shape[1:] or (cache.vocab, cache.tokenizer) != (
                first.vocab,
                first.tokenizer,
            ):
                raise ZooError(
                    f"the {split} split was tokenized by another tokenizer, or at another size, than the first"
                )
        return {split: ClipTokenSource(cache) for split, cache in self.caches.items()}

    @property
    def first(self) -> ClipCache:
        """The cache of the first split."""
        return next(iter(self.caches.values()))

    def facts(self) -> dict[str, str]:
        """The artifact that decodes the tokens."""
        return {"visual_tokenizer": self.first.tokenizer} if self.first.tokenizer else {}

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip's tokens."""
        t, h, w = self.first.ids.shape[1:]
        return t, h, w

    @property
    def classes(self) -> tuple[str, ...]:
        return self.first.classes

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    @property
    def max_tokens(self) -> int:
        return int(np.prod(self.grid))
