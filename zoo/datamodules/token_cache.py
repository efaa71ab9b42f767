"""Pictures that were tokenized beforehand: safetensors files of ids, as `zoo tokenize` writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.settings import SplitFilesConfig
from zoo.datamodules.shards import expand
from zoo.errors import ZooError

Facts = tuple[int, str, tuple[str, ...]]


@config
class TokenCacheConfig(SplitFilesConfig):
    """Files with `ids` [N, K] (or [N, views, K]: one view is drawn in each pass) and `labels` [N].

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: the files; a path may stand for many (`ids-{000..011}.safetensors`, or with `*` and `?`).
        tokens: use only the first ids of each picture (of a tokenizer that orders them); 0 uses all.
        batch_size, eval_batch_size: pictures a batch, in training and otherwise (None: the same).
    """

    tokens: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Cache:
    """One or several token files.

    Attributes:
        ids: [N, views, K] int64.
        labels: [N] int64, -1 where a picture has none.
        vocab: number of codes; tokenizer: the artifact that made them; classes: names of the labels.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    vocab: int
    tokenizer: str = ""
    classes: tuple[str, ...] = field(default=())


def read_cache(files: list[Path]) -> Cache:
    """Token files of pictures as one.

    Raises:
        ZooError: not such a file, ids outside the vocabulary, or files of different tokenizers.
    """
    ids, labels, facts = read_tokens(files, "[N, K] or [N, views, K]", (2, 3))
    ids = [rows if rows.ndim == 3 else rows[:, None] for rows in ids]
    if len(set(facts)) > 1 or len({rows.shape[1:] for rows in ids}) > 1:
        raise ZooError(f"'{files[0]}' and the files after it come from different tokenizers or settings")
    return Cache(np.concatenate(ids), np.concatenate(labels).astype(np.int64), *facts[0])


def read_tokens(
    files: list[Path], shape: str, dims: tuple[int, ...]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[Facts]]:
    """Ids, labels (-1 where there are none) and facts (codes, tokenizer, classes) of each file of `zoo tokenize`.

    Raises:
        ZooError: not such a file, ids of other than *dims* dimensions (*shape* in words), or outside the vocabulary.
    """
    ids, labels, facts = [], [], []
    for file in files:
        try:
            with safe_open(file, "np") as stored:
                rows = stored.get_tensor("ids").astype(np.int64)
                known = "labels" in set(stored.keys())
                labels.append(stored.get_tensor("labels") if known else np.full(len(rows), -1))
                about = dict(stored.metadata() or {})
                classes = tuple(json.loads(about.get("classes", "[]")))
                facts.append((int(about["vocab_size"]), about.get("tokenizer", ""), classes))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ZooError(f"'{file}' is no token file of `zoo tokenize` ({error})") from None
        if rows.ndim not in dims:
            raise ZooError(f"'{file}' holds ids of shape {list(rows.shape)}, expected {shape}")
        if rows.size and (rows.min() < 0 or rows.max() >= facts[-1][0]):
            raise ZooError(
                f"'{file}' holds ids from {rows.min()} to {rows.max()}, but its tokenizer has {facts[-1][0]} codes"
            )
        ids.append(rows)
    return ids, labels, facts


class TokenSource:
    """Batches ids [B, K], labels [B], index [B]; which view of a picture is a function of seed, pass and sample."""

    def __init__(self, cache: Cache, tokens: int, seed: int) -> None:
        self.cache, self.tokens, self.seed = cache, tokens or cache.ids.shape[2], seed
        self.augment = False

    def __len__(self) -> int:
        return len(self.cache.ids)

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        views = self.cache.ids.shape[1]
        view = np.zeros(len(index), np.int64)
        if self.augment and views > 1:
            view = np.array([np.random.default_rng([self.seed, epoch, int(i)]).integers(views) for i in index])
        return {
            "ids": self.cache.ids[index, view, : self.tokens],
            "labels": self.cache.labels[index],
            "index": index,
        }


class TokenCache(Data):
    """Datamodule of cached tokens; see `TokenCacheConfig`.

    Raises (in setup):
        ZooError: a file is missing, changed or no token file; pictures without classes.
    """

    Config: ClassVar[type] = TokenCacheConfig
    config: TokenCacheConfig
    needs_tokenizer: ClassVar[bool] = False
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("token_generation",)

    def __init__(self, config: TokenCacheConfig, tokenizer: Any = None, seed: int = 0) -> None:
        super().__init__(config, None, seed)
        self.caches: dict[str, Cache] = {}

    def _files(self) -> list[FileConfig]:
        cfg = self.config
        return [one for files in (cfg.train, cfg.val, cfg.test) for file in files for one in expand(file, cfg.root)]

    def _load(self) -> dict[str, Any]:
        cfg = self.config
        for split in ("train", "val", "test"):
            files = [check(one, cfg.root) for file in getattr(cfg, split) for one in expand(file, cfg.root)]
            if files:
                self.caches[split] = read_cache(files)
        length = self.first.ids.shape[2]
        for split, cache in self.caches.items():
            if cache.ids.shape[2] != length or cache.vocab != self.first.vocab:
                raise ZooError(f"the {split} split was tokenized by another tokenizer than the first one")
            if cache.labels.min() < 0:
                raise ZooError(f"the {split} split holds pictures without a class, which a generator here needs")
        if cfg.tokens > length:
            raise ZooError(f"data.tokens is {cfg.tokens}, but the pictures have {length} tokens")
        return {split: TokenSource(cache, cfg.tokens, self.seed) for split, cache in self.caches.items()}

    @property
    def first(self) -> Cache:
        """The cache of the first split."""
        return next(iter(self.caches.values()))

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers where the files name none."""
        highest = max(int(cache.labels.max()) for cache in self.caches.values())
        return self.first.classes or tuple(map(str, range(highest + 1)))

    def facts(self) -> dict[str, str]:
        """The artifact that decodes the tokens."""
        return {"visual_tokenizer": self.first.tokenizer} if self.first.tokenizer else {}

    @property
    def max_tokens(self) -> int:
        return self.config.tokens or self.first.ids.shape[2]
