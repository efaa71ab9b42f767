"""What all picture data sets share: reading, the official preprocessing, augmentation that resumes, and batches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.loader import Source
from zoo.errors import ZooError
from zoo.nn.preprocess import PreprocessConfig, fit_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_KERNELS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@config
class PictureAugmentConfig:
    """What training changes at random in each pass; a pure function of seed, pass and sample.

    Attributes:
        flip: mirror left and right with probability 1/2.
        random_crop: cut the square out of the resized picture anywhere; otherwise from its centre.
        shift: move by up to this many pixels in both directions, edges repeated.
        shuffle_channels: permute red, green and blue (for small sets of drawings; it makes colours meaningless).
    """

    flip: bool = False
    random_crop: bool = False
    shift: int = 0
    shuffle_channels: bool = False


class Reader(Protocol):
    """Pictures of one split by number."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], -1 where a picture has none."""

    @property
    def names(self) -> Sequence[str]:
        """Of each picture."""

    def __len__(self) -> int:
        """Number of pictures."""

    def read(self, index: int) -> Image.Image:
        """One picture as RGB."""


def open_rgb(source: bytes | str | Path, name: str = "") -> Image.Image:
    """A picture file, or its bytes, as RGB; transparency is laid on white.

    Raises:
        ZooError: not a picture, or a broken one.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ZooError(f"'{name or source!r}' is not a readable picture ({error})") from None


def resize(image: Image.Image, settings: PreprocessConfig) -> Image.Image:
    """The resizing of *settings*, not yet the crop; PIL's filters, as the published tokenizers use them."""
    if settings.resize == "none":
        return image
    width, height = image.size
    size, short = settings.size, min(width, height)
    # the longer side is truncated, as torchvision does
    target = (size, size) if settings.resize == "both" else (int(size * width / short), int(size * height / short))
    return image if image.size == target else image.resize(target, _KERNELS[settings.kernel])


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """RGB picture -> uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def fit(image: Image.Image, settings: PreprocessConfig) -> NDArray[np.uint8]:
    """RGB picture -> uint8 [3, size, size]: resized, then cut from the centre.

    Raises:
        ZooError: a side is shorter than `size` although nothing is to be resized.
    """
    if not settings.antialias and settings.resize != "none":  # PIL always filters
        x = torch.from_numpy(to_array(image)).float() / 255
        return (fit_pixels(x, settings) * 255).round().to(torch.uint8).numpy()
    return crop(to_array(resize(image, settings)), settings.size)


def crop(x: NDArray[np.uint8], size: int, place: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
    """[3, H, W] -> [3, size, size] from the centre, or at *place* (row and column as shares of the room)."""
    room = np.array(x.shape[1:]) - size
    if room.min() < 0:
        raise ZooError(f"a picture of {x.shape[2]} x {x.shape[1]} pixels is smaller than the {size} that are wanted")
    top, left = np.round(room / 2).astype(int) if place is None else (place * (room + 1)).astype(int)
    return x[:, top : top + size, left : left + size]


class PictureSource:
    """Batches `pixels` [B, 3, S, S] float32 in [0, 1], `labels` [B] and `index` [B].

    Args:
        reader: the pictures.
        preprocess: how they are fitted.
        changes: augmentation, used while `augment` is set.
        seed: of the augmentation.
        keep: hold the resized pictures in memory after they were read once.
    """

    def __init__(
        self, reader: Reader, preprocess: PreprocessConfig, changes: PictureAugmentConfig, seed: int, keep: bool
    ) -> None:
        self.reader, self.preprocess, self.changes, self.seed = reader, preprocess, changes, seed
        self.augment = False
        self.kept: dict[int, NDArray[np.uint8]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.reader)

    def picture(self, index: int) -> NDArray[np.uint8]:
        """uint8 [3, H, W] of one sample: resized, and cut to the square unless crops are random."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        image = self.reader.read(index)
        pixels = (
            to_array(resize(image, self.preprocess))
            if self.changes.random_crop and self.preprocess.antialias
            else fit(image, self.preprocess)
        )
        if self.kept is not None:
            self.kept[index] = pixels
        return pixels

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        size = self.preprocess.size
        pixels = np.empty((len(index), 3, size, size), np.float32)
        for row, i in enumerate(index):
            x = self.picture(int(i))
            pixels[row] = self._changed(x, epoch, int(i)) if self.augment else crop(x, size)
        return {"pixels": pixels / np.float32(255), "labels": self.reader.labels[index], "index": index}

    def _changed(self, x: NDArray[np.uint8], epoch: int, index: int) -> NDArray[np.uint8]:
        changes, size = self.changes, self.preprocess.size
        draw = np.random.default_rng([self.seed & (2**63 - 1), epoch, index])
        place, move, mirror = draw.random(2), draw.random(2), draw.random() < 0.5
        x = crop(x, size, place if changes.random_crop else None)
        if changes.shift:
            x = crop(np.pad(x, ((0, 0), *[(changes.shift, changes.shift)] * 2), "edge"), size, move)
        if changes.flip and mirror:
            x = x[:, :, ::-1]
        return x[draw.permutation(3)] if changes.shuffle_channels else x


class PictureData(Data):
    """Base of the picture data sets: `_readers` gives the pictures of each split, the rest is here."""

    needs_tokenizer: ClassVar[bool] = False
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("image_reconstruction", "proxy_codes", "flow_matching")

    def __init__(self, config: Any, tokenizer: Any = None, seed: int = 0) -> None:
        super().__init__(config, None, seed)
        self._classes: tuple[str, ...] = ()

    def _readers(self) -> dict[str, Reader]:
        """Split -> pictures; sets `_classes`."""
        raise NotImplementedError

    def _load(self) -> dict[str, Source]:
        cfg = self.config
        return {
            split: PictureSource(reader, cfg.preprocess, cfg.augment, self.seed, cfg.cache)
            for split, reader in self._readers().items()
        }

    @property
    def num_outputs(self) -> int:
        return len(self._classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def max_tokens(self) -> int:
        return 1


class Part:
    """Some pictures of a reader, in the order of *index*."""

    def __init__(self, reader: Reader, index: NDArray[np.int64]) -> None:
        self.reader, self.index = reader, index
        self.labels = reader.labels[index]
        self.names = [reader.names[i] for i in index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Image.Image:
        """One picture as RGB."""
        return self.reader.read(int(self.index[index]))


def hold_out(readers: dict[str, Reader], fraction: float) -> dict[str, Reader]:
    """With `train` but no `val`: every picture's part by a fixed permutation, *fraction* of them for `val`."""
    if not fraction or "val" in readers or "train" not in readers:
        return readers
    order = np.random.default_rng(0).permutation(len(readers["train"]))
    count = max(1, round(fraction * len(order)))
    rest = {split: reader for split, reader in readers.items() if split != "train"}
    train = readers["train"]
    return {"train": Part(train, np.sort(order[count:])), "val": Part(train, np.sort(order[:count])), **rest}
