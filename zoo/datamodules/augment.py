"""Reverse complement, and random draws that depend only on (seed, epoch, sample): the same in any worker or order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TABLE = bytes.maketrans(b"ACGTacgt", b"TGCAtgca")  # other letters stay, as in the official code
_LOOKUP = np.frombuffer(_TABLE, np.uint8)


def reverse_complement(text: bytes) -> bytes:
    """The other strand, read 5' to 3'. Only ACGT and acgt are complemented; N, IUPAC letters and U stay."""
    return text.translate(_TABLE)[::-1]


def reverse_complement_rows(windows: NDArray[np.uint8], rows: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """*windows* uint8 [B, L] with the rows marked in bool [B] replaced by their reverse complement."""
    if not rows.any():
        return windows
    out = windows.copy()
    out[rows] = _LOOKUP[windows[rows][:, ::-1]]
    return out


def draw(seed: int, epoch: int, index: NDArray[np.int64], stream: int = 0) -> NDArray[np.uint64]:
    """64 random bits for each sample *index*, a pure function of (seed, epoch, index, stream) (splitmix64)."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed & (2**64 - 1)))
        key = _mix(key ^ np.uint64(epoch & (2**64 - 1)))
        key = _mix(key ^ np.uint64(stream))
        return _mix(key ^ np.asarray(index).astype(np.uint64))


def coins(seed: int, epoch: int, index: NDArray[np.int64], stream: int = 0) -> NDArray[np.bool_]:
    """A fair coin for each sample."""
    return (draw(seed, epoch, index, stream) >> np.uint64(63)).astype(np.bool_)


def integers(
    seed: int, epoch: int, index: NDArray[np.int64], low: int, high: int, stream: int = 0
) -> NDArray[np.int64]:
    """An integer of [low, high], both included, for each sample."""
    width = np.uint64(high - low + 1)
    return (draw(seed, epoch, index, stream) % width).astype(np.int64) + low


def uniform(seed: int, epoch: int, index: NDArray[np.int64], stream: int = 0) -> NDArray[np.float64]:
    """A number of [0, 1) for each sample."""
    return (draw(seed, epoch, index, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = np.asarray(z + np.uint64(0x9E3779B97F4A7C15))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
