"""Pictures in folders, and the data sets that torchvision and scikit-learn read."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from zoo.config import config
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.pictures import (
    SUFFIXES,
    Part,
    PictureAugmentConfig,
    PictureData,
    Reader,
    hold_out,
    open_rgb,
)
from zoo.datamodules.settings import DataConfig
from zoo.errors import ZooError
from zoo.nn.preprocess import PreprocessConfig

# name -> (class of torchvision.datasets, arguments of the training part, of the test part)
_TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "imagenet": ("ImageNet", {"split": "train"}, {"split": "val"}),
}


@config
class ImageDataConfig(DataConfig):
    """A set of pictures.

    Attributes:
        root: folder that the paths are relative to; None: the catalogue's, then the working directory. For torchvision
            sets the folder that holds their files.
        train, val, test: folders with one folder for each class, or with pictures right inside them (no classes).
        builtin: a set that another package reads in place of folders: scikit-learn's `digits` (ships with it), or one
            of torchvision's, whose files must lie in `root`; nothing is downloaded.
        val_fraction: part of train held out for val where there is no val.
        classes: names of the class folders; () takes those of the first split.
        preprocess: resizing, crop and size. The normalisation that stands there is the model's business.
        augment: random changes in training.
        cache: keep the resized pictures in memory.
        batch_size, eval_batch_size: pictures a batch, in training and otherwise (None: the same).
    """

    train: FileConfig | None = None
    val: FileConfig | None = None
    test: FileConfig | None = None
    builtin: Literal["", "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "stl10", "imagenet"] = ""
    val_fraction: float = 0.0
    classes: tuple[str, ...] = ()
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    augment: PictureAugmentConfig = field(default_factory=PictureAugmentConfig)
    cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        folders = [split for split in (self.train, self.val, self.test) if split is not None]
        if bool(folders) == bool(self.builtin):
            raise ValueError("a set of pictures needs folders (train, val, test) or one 'builtin' name, and not both")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")


class FolderReader:
    """The pictures below *place*, sorted by path.

    Raises:
        ZooError: no picture there, or a folder that is none of *classes*.
    """

    def __init__(self, place: Path, classes: tuple[str, ...]) -> None:
        self.files = [f for f in sorted(place.rglob("*")) if f.suffix.lower() in SUFFIXES]
        if not self.files:
            raise ZooError(f"'{place}' holds no picture ({', '.join(SUFFIXES)})")
        number = {name: i for i, name in enumerate(classes)}
        labels = []
        for file in self.files:
            top = file.relative_to(place).parts[0]
            if classes and top not in number:
                raise ZooError(f"'{file}' lies in none of the class folders {', '.join(classes)}")
            labels.append(number.get(top, -1))
        self.labels = np.array(labels, np.int64)
        self.names = [file.relative_to(place).as_posix() for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        """One picture as RGB."""
        return open_rgb(self.files[index])


class BuiltinReader:
    """A data set that gives (picture, label) by number."""

    def __init__(self, pictures: Any, labels: Any) -> None:
        self.pictures = pictures
        self.labels = np.asarray(labels, np.int64)
        self.names = [str(i) for i in range(len(self.labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """One picture as RGB."""
        picture = self.pictures[index]
        return (picture[0] if isinstance(picture, tuple) else Image.fromarray(picture)).convert("RGB")


class ImageData(PictureData):
    """Datamodule of pictures; see `ImageDataConfig`.

    Raises (in setup):
        ZooError: a folder is missing, changed or empty; a class folder is unknown; a package or its files are missing.
    """

    Config: ClassVar[type] = ImageDataConfig
    config: ImageDataConfig

    def _files(self) -> list[FileConfig]:
        cfg = self.config
        if cfg.builtin:
            return (
                [] if cfg.builtin == "digits" else [FileConfig(path=str(Path(cfg.root or ".").expanduser().resolve()))]
            )
        return [file for file in (cfg.train, cfg.val, cfg.test) if file is not None]

    def _readers(self) -> dict[str, Reader]:
        cfg = self.config
        if cfg.builtin == "digits":
            return self._digits()
        if cfg.builtin:
            return hold_out(self._torchvision(), cfg.val_fraction)
        places = {
            split: check(file, cfg.root, folder=True)
            for split in ("train", "val", "test")
            if (file := getattr(cfg, split)) is not None
        }
        first = next(iter(places.values()))
        self._classes = cfg.classes or tuple(sorted(f.name for f in first.iterdir() if f.is_dir()))
        readers: dict[str, Reader] = {split: FolderReader(place, self._classes) for split, place in places.items()}
        return hold_out(readers, cfg.val_fraction)

    def _digits(self) -> dict[str, Reader]:
        """1,797 handwritten digits of 8 x 8 pixels; 80 % train, 10 % val, 10 % test by a fixed permutation."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ZooError(
                "the 'digits' come with scikit-learn, which is not installed: pip install scikit-learn"
            ) from None
        found = load_digits()
        pictures = np.round(found.images * (255 / 16)).astype(np.uint8)
        self._classes = tuple(map(str, range(10)))
        everything = BuiltinReader(pictures, found.target)
        order = np.random.default_rng(0).permutation(len(everything))
        cut = [round(0.8 * len(order)), round(0.9 * len(order))]
        return {
            split: Part(everything, part)
            for split, part in zip(("train", "val", "test"), np.split(order, cut), strict=True)
        }

    def _torchvision(self) -> dict[str, Reader]:
        from torchvision import datasets

        name, *parts = _TORCHVISION[self.config.builtin]
        root = Path(self.config.root or ".").expanduser()
        readers: dict[str, Reader] = {}
        for split, options in zip(("train", "test"), parts, strict=True):
            try:
                found = getattr(datasets, name)(str(root), **options)
            except (RuntimeError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ZooError(f"torchvision finds no {name} in data.root '{root}' ({reason})") from None
            labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
            readers[split] = BuiltinReader(found, labels)
            self._classes = tuple(map(str, getattr(found, "classes", range(int(labels.max()) + 1))))
        return readers
