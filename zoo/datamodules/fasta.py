"""FASTA: reading whole files, and random access into large ones through a pyfaidx index kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules.manifest import digest, opened
from zoo.errors import ZooError, nearest

_BOM = b"\xef\xbb\xbf"  # what Windows editors put before a text
_BLANKS = b" \t\r\v\f"


def read_fasta(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(header without '>', sequence) of each record of a plain or gzip-compressed file, case kept.

    Raises:
        ZooError: missing, empty, not FASTA, or a broken gzip file.
    """
    place = Path(path)
    if not place.is_file():
        raise ZooError(f"FASTA file '{place}' does not exist")
    header: str | None = None
    parts: list[bytes] = []
    with opened(place) as stream:
        for number, raw in enumerate(stream):
            line = (raw.removeprefix(_BOM) if number == 0 else raw).strip()
            if line.startswith(b">"):
                if header is not None:
                    yield header, b"".join(parts)
                header, parts = line[1:].decode("latin-1").strip(), []
            elif header is not None:
                parts.append(line.translate(None, _BLANKS))
            elif line:
                raise ZooError(f"'{place}' is not FASTA: it begins with {line[:20]!r}, not with '>'")
    if header is None:
        raise ZooError(f"FASTA file '{place}' is empty")
    yield header, b"".join(parts)


def cache_folder() -> Path:
    """Where indexes and decompressed genomes are kept: $ZOO_CACHE, else ~/.cache/seqzoo, else a temporary folder."""
    wanted = os.environ.get("ZOO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "seqzoo"
    )
    folder = Path(wanted) / "fasta"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home: the temporary folder serves as well
    folder = Path(tempfile.gettempdir()) / f"seqzoo-{os.getuid() if hasattr(os, 'getuid') else 0}" / "fasta"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Record:
    """A sequence of a FASTA file: where its bases lie (offset, bases and bytes a line) and how many they are."""

    name: str
    file: int
    length: int
    offset: int
    line_bases: int
    line_bytes: int


class Genome:
    """Random access to the sequences of one or more FASTA files, as bytes; nothing is read before it is asked for.

    Compressed files are decompressed once into the cache folder, and files that cannot be indexed by arithmetic (lines
    of uneven length, or with blanks) are rewritten there; indexes are kept there too, so that nothing is ever written
    beside the data. Files are memory-mapped: worker processes share them.

    Attributes:
        records: name -> Record, in file order.

    Raises:
        ZooError: missing, empty, not FASTA, broken gzip, or a name that occurs twice.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths: list[Path] = []
        self.records: dict[str, Record] = {}
        for number, given in enumerate(paths):
            path = _plain(given)
            try:
                records = _index(given, path, number)
            except _Irregular:
                path = _one_line_each(path)
                records = _index(given, path, number)
            self.paths.append(path)
            for record in records:
                if record.name in self.records:
                    raise ZooError(f"the sequence name '{record.name}' occurs twice ('{given}')")
                self.records[record.name] = record
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}  # a memory map is opened anew in each process

    def record(self, name: str) -> Record:
        """The record *name*.

        Raises:
            ZooError: no such sequence, with the nearest one.
        """
        if name not in self.records:
            raise ZooError(f"the FASTA files have no sequence '{name}'" + nearest(name, self.records))
        return self.records[name]

    def read(self, name: str, start: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bases [start, end) of a sequence as uint8, 0-based, clipped to the sequence."""
        record = self.record(name)
        start, end = max(start, 0), min(record.length if end is None else end, record.length)
        if end <= start:
            return np.empty(0, np.uint8)
        return self.slice(record, start, end)

    def slice(self, record: Record, start: int, end: int) -> NDArray[np.uint8]:
        """As `read`, for 0 <= start < end <= record.length."""
        data = self._maps.get(record.file)
        if data is None:
            data = self._maps[record.file] = np.asarray(np.memmap(self.paths[record.file], np.uint8, "r"))
        bases, width = record.line_bases, record.line_bytes
        first = record.offset + start // bases * width + start % bases
        last = record.offset + (end - 1) // bases * width + (end - 1) % bases + 1
        raw = data[first:last]
        if width == bases or last - first == end - start:
            return raw
        inside = raw[raw > 32]  # drop the line ends
        if len(inside) != end - start:
            raise ZooError(f"'{self.paths[record.file]}' has blanks inside the lines of '{record.name}': remove them")
        return inside


def _plain(path: Path) -> Path:
    """The file itself, or its decompressed copy in the cache."""
    if not path.is_file():
        raise ZooError(f"FASTA file '{path}' does not exist")
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return path
    target = cache_folder() / f"{digest(path)[:32]}.fa"
    if not target.is_file():
        with opened(path) as packed, _written(target) as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    return target


def _one_line_each(path: Path) -> Path:
    """A copy in the cache with each sequence on one line, which is what an index by arithmetic needs."""
    target = cache_folder() / f"{digest(path)[:32]}.lines.fa"
    if not target.is_file():
        with _written(target) as out:
            for header, sequence in read_fasta(path):
                out.write(b">" + header.encode("latin-1") + b"\n" + sequence + b"\n")
    return target


@contextmanager
def _written(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete; another process may write the same one."""
    descriptor, name = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


class _Irregular(Exception):
    """The file cannot be indexed as it is: the lines of a sequence differ in length or hold blanks, or a BOM leads."""


def _index(given: Path, path: Path, number: int) -> list[Record]:
    from pyfaidx import FastaIndexingError, FastaNotFoundError, FetchError, IndexNotFoundError

    with path.open("rb") as stream:
        start = stream.read(4096)
    head = start.removeprefix(_BOM).lstrip().split(b"\n")[0].rstrip()
    if not head:
        raise ZooError(f"FASTA file '{given}' is empty")
    if not head.startswith(b">"):
        raise ZooError(f"'{given}' is not FASTA: it begins with {head[:20]!r}, not with '>'")
    if start.startswith(_BOM):
        raise _Irregular
    status = path.stat()
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    index = cache_folder() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".fai")
    try:
        entries = _faidx(path, index)
    except (FastaIndexingError, FastaNotFoundError, FetchError, IndexNotFoundError, ValueError) as error:
        index.unlink(missing_ok=True)
        if "Line length" in str(error):
            raise _Irregular from None
        text = str(error).strip().splitlines() or ["no reason given"]
        raise ZooError(f"'{given}' cannot be indexed as FASTA: {text[0]}") from None
    kept = [
        Record(name, number, entry.rlen, entry.offset, entry.lenc, entry.lenb)
        for name, entry in entries.items()
        if entry.rlen > 0
    ]
    if not kept:
        raise ZooError(f"FASTA file '{given}' holds no bases")
    if _blank_inside(path, kept):
        raise _Irregular
    return kept


def _faidx(path: Path, index: Path) -> Mapping[str, Any]:
    """pyfaidx' entries of each name; the index file *index* is read, or built and then appears complete.

    pyfaidx writes it in place, where another process could read the first half of it.
    """
    from pyfaidx import Faidx

    if index.is_file():
        with Faidx(str(path), indexname=str(index), as_raw=True, rebuild=False) as faidx:
            return dict(faidx.index)
    with tempfile.TemporaryDirectory(dir=index.parent) as place:
        built = Path(place) / index.name
        with Faidx(str(path), indexname=str(built), as_raw=True, rebuild=False) as faidx:
            entries = dict(faidx.index)
        os.replace(built, index)
    return entries


def _blank_inside(path: Path, records: list[Record]) -> bool:
    """Whether the first line of a sequence holds a blank; a later one that does is of another length, or is caught
    when it is read."""
    data = np.memmap(path, np.uint8, "r")
    firsts = (data[r.offset : r.offset + min(r.line_bases, r.length)] for r in records)
    return any(bool((line <= 32).any()) for line in firsts)
