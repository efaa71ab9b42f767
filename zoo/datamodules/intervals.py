"""BED intervals, and the official rule that makes a window of fixed length from an interval of any length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.datamodules.manifest import opened
from zoo.errors import ZooError, nearest

_SPLITS = {"train": "train", "valid": "val", "validation": "val", "val": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Interval:
    """A line of a BED file: 0-based, half-open; `split` is its fourth column where that was asked for."""

    name: str
    start: int
    end: int
    split: str
    place: str


def read_bed(path: Path, splits: bool = False) -> Iterator[Interval]:
    """The intervals of a BED file (tab- or blank-separated, plain or gzip-compressed).

    With *splits* the fourth column, in which BED otherwise has a name, is the split (`train` where there is none).

    Raises:
        ZooError: a line without three columns, with positions that are no numbers, or with an unknown split.
    """
    found = False
    with opened(path) as raw:
        for number, line in enumerate(io.TextIOWrapper(raw, "utf-8-sig", "replace"), 1):
            parts = line.split()
            if not parts or parts[0].startswith("#") or parts[0] in ("track", "browser"):
                continue
            place = f"'{path}' line {number}"
            if len(parts) < 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
                raise ZooError(f"{place} is not BED: expected sequence, start, end[, split], got '{line.strip()[:60]}'")
            word = parts[3].lower() if splits and len(parts) > 3 else "train"
            if word not in _SPLITS:
                raise ZooError(f"{place}: unknown split '{parts[3]}'" + nearest(word, _SPLITS))
            found = True
            yield Interval(parts[0], int(parts[1]), int(parts[2]), _SPLITS[word], place)
    if not found:
        raise ZooError(f"BED file '{path}' holds no intervals")


def stretch(start: int, end: int, length: int) -> tuple[int, int]:
    """The window of *length* bases for an interval (HyenaDNA, FastaInterval).

    A shorter interval grows by half of what is missing on the left and the rest on the right; a longer one keeps its
    first *length* bases. The window may reach beyond its sequence; what lies outside is clipped or filled.
    """
    extra = length - (end - start)
    if extra <= 0:
        return start, start + length
    return start - extra // 2, end + extra - extra // 2
