"""The files of a data set: where they are, and that they are the ones the data set was published with."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zoo.config import config
from zoo.errors import ZooError


@config
class FileConfig:
    """One file, or a folder of files where a format is one.

    Attributes:
        path: absolute, or relative to the data set's `root`; without a root to the catalogue's `datamodules/`, and
            if it is not there to the working directory.
        sha256: of the file as it lies there (compressed files compressed), of a folder that of the sorted list of its
            files and their sha256; checked before training when given.
    """

    path: str
    sha256: str | None = None


_known: dict[tuple[str, int, int], str] = {}


def locate(path: str, root: str | None = None) -> Path:
    """The file (or folder) *path* of a data set.

    Raises:
        ZooError: it does not exist; says where it was looked for.
    """
    from zoo._resources import folder

    given = Path(path).expanduser()
    if given.is_absolute():
        places = [given]
    elif root is not None:
        if not Path(root).expanduser().is_dir():
            raise ZooError(f"folder '{root}' does not exist; set data.root to the folder that holds '{path}'")
        places = [Path(root).expanduser() / given]
    else:
        places = [folder("datamodules") / given, Path.cwd() / given]
    for place in places:
        if place.exists():
            return place
    raise ZooError(f"data file '{path}' does not exist (looked for {' and '.join(map(str, places))})")


def digest(path: Path) -> str:
    """sha256 of a file, remembered for as long as its size and time of change stay the same in this process."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in inside)
        return hashlib.sha256(listing.encode()).hexdigest()
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _known:
        with path.open("rb") as stream:
            _known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _known[key]


def check(file: FileConfig, root: str | None = None, *, folder: bool = False) -> Path:
    """The path of *file* after checking that it exists, holds something and has the sha256 it should have.

    Raises:
        ZooError: missing, empty or changed; a folder where a file is wanted, or (with *folder*) the reverse.
    """
    path = locate(file.path, root)
    if path.is_dir() != folder:
        raise ZooError(
            f"'{path}' is a {'folder' if not folder else 'file'}, expected a {'folder' if folder else 'file'}"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise ZooError(f"data file '{path}' is empty")
    if file.sha256 and digest(path) != file.sha256:
        raise ZooError(
            f"data file '{path}' is not the one the data set was published with: its sha256 is {digest(path)}, "
            f"expected {file.sha256}"
        )
    return path


def record(file: FileConfig, root: str | None = None) -> dict[str, str]:
    """`{"path": ..., "sha256": ...}` of a file as it is on disk."""
    path = locate(file.path, root)
    return {"path": str(path), "sha256": digest(path)}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a plain or gzip-compressed file (told by its first bytes).

    Raises:
        ZooError: a broken or truncated gzip file, whenever it is noticed while reading.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            if packed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield io.BufferedReader(stream)
            else:
                yield raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ZooError(f"'{path}' is a broken gzip file ({error}); copy or download it again") from None
