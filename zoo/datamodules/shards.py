"""Pictures in tar files, one or many: members that share a name up to the first dot are one sample (WebDataset)."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from zoo.config import config
from zoo.datamodules.manifest import FileConfig, check, locate
from zoo.datamodules.pictures import SUFFIXES, PictureAugmentConfig, PictureData, Reader, hold_out, open_rgb
from zoo.datamodules.settings import SplitFilesConfig
from zoo.errors import ZooError
from zoo.nn.preprocess import PreprocessConfig


@config
class ShardDataConfig(SplitFilesConfig):
    """A set of pictures in tar files.

    Attributes:
        root: folder that the files' paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: the files. A path may stand for many: `train-{0000..0146}.tar`, or with `*` and `?`.
        label: how a sample says its class: name of a member (`cls`: a number), or of a field of its `json`.
        classes: names of the classes, in the order of their numbers.
        val_fraction: part of train held out for val where there is no val.
        preprocess, augment, cache, batch_size, eval_batch_size, bucket, num_workers: as in ImageDataConfig.
    """

    label: str = "cls"
    classes: tuple[str, ...] = ()
    val_fraction: float = 0.0
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    augment: PictureAugmentConfig = field(default_factory=PictureAugmentConfig)
    cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")


def expand(file: FileConfig, root: str | None) -> list[FileConfig]:
    """The files that a path with `{0000..0146}`, `*` or `?` stands for, in order.

    Raises:
        ZooError: none is there; a sha256 beside a path of many files.
    """
    spans = re.findall(r"\{(\d+)\.\.(\d+)\}", file.path)
    if not spans and not any(letter in file.path for letter in "*?"):
        return [file]
    if file.sha256:
        raise ZooError(f"'{file.path}' stands for many files, which cannot have one sha256: list them one by one")
    paths = [file.path]
    for first, last in spans:
        paths = [
            re.sub(r"\{\d+\.\.\d+\}", f"{number:0{len(first)}d}", path, count=1)
            for path in paths
            for number in range(int(first), int(last) + 1)
        ]
    found = []
    for path in paths:
        if any(letter in path for letter in "*?"):
            parent = locate(str(Path(path).parent), root)
            matches = sorted(glob.glob(Path(path).name, root_dir=parent))
            if not matches:
                raise ZooError(f"no file in '{parent}' fits '{Path(path).name}'")
            found += [FileConfig(path=str(parent / name)) for name in matches]
        else:
            found.append(FileConfig(path=path))
    return found


class ShardReader:
    """Samples of tar files, found once by their headers and read by their offsets.

    Raises:
        ZooError: a file is no tar file, a sample has no picture, a label is missing or no class.
    """

    def __init__(self, files: list[Path], label: str, classes: tuple[str, ...]) -> None:
        self.places: list[tuple[Path, int, int]] = []
        self.names: list[str] = []
        labels: list[int] = []
        for file in files:
            for key, members in _samples(file).items():
                pictures = [m for suffix, m in members.items() if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES]
                if not pictures:
                    raise ZooError(f"sample '{key}' of '{file}' has no picture ({', '.join(SUFFIXES)})")
                self.places.append((file, *pictures[0]))
                self.names.append(key)
                labels.append(_label(file, key, members, label, classes))
        if not self.places:
            raise ZooError(f"'{files[0]}' holds no sample")
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> Image.Image:
        """One picture as RGB."""
        return open_rgb(_bytes(*self.places[index]), f"{self.names[index]} of {self.places[index][0]}")


def _samples(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Name -> member suffix -> (offset, length), in the order of the file."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[suffix] = (
                        member.offset_data,
                        member.size,
                    )
    except tarfile.TarError as error:
        raise ZooError(f"'{file}' is not an uncompressed tar file ({error})") from None
    return samples


def _label(file: Path, key: str, members: dict[str, tuple[int, int]], label: str, classes: tuple[str, ...]) -> int:
    value: Any = -1
    if label in members:
        value = _bytes(file, *members[label]).decode("utf-8", "replace").strip()
    elif "json" in members:
        value = json.loads(_bytes(file, *members["json"])).get(label, -1)
    elif classes:
        raise ZooError(f"sample '{key}' of '{file}' has no '{label}'")
    if value in classes:
        return classes.index(value)
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ZooError(f"'{value}' of sample '{key}' of '{file}' is none of the classes {', '.join(classes)}") from None
    if classes and not 0 <= number < len(classes):
        raise ZooError(f"sample '{key}' of '{file}' is of class {number}, but there are only {len(classes)}")
    return number


def _bytes(file: Path, offset: int, length: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


class ShardData(PictureData):
    """Datamodule of pictures in tar files; see `ShardDataConfig`.

    The order is a permutation of all samples of all files, made anew in each pass, so that it resumes exactly; the
    samplers of streaming loaders, which draw with replacement, cannot.
    """

    Config: ClassVar[type] = ShardDataConfig
    config: ShardDataConfig

    def _files(self) -> list[FileConfig]:
        cfg = self.config
        return [one for files in (cfg.train, cfg.val, cfg.test) for file in files for one in expand(file, cfg.root)]

    def _readers(self) -> dict[str, Reader]:
        cfg = self.config
        readers: dict[str, Reader] = {}
        for split in ("train", "val", "test"):
            files = [check(one, cfg.root) for file in getattr(cfg, split) for one in expand(file, cfg.root)]
            if files:
                readers[split] = ShardReader(files, cfg.label, cfg.classes)
        highest = max(int(reader.labels.max()) for reader in readers.values())
        self._classes = cfg.classes or tuple(map(str, range(highest + 1)))
        return hold_out(readers, cfg.val_fraction)
