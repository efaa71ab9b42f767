"""The header of a safetensors file, read and weighed before anything is built from it. Imports no torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

# bytes of one element; the names are those of the format
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
LONGEST = 100_000_000  # bytes of a header, as the library has it


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of each tensor, after its place in the file proved to be what the shape needs.

    Raises:
        ZooError: the header claims to be longer than the file, is no JSON object of tensors, or promises values that
            the file does not hold.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            lead = stream.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else -1
            if length < 2 or length > min(size - 8, LONGEST):
                raise _damaged(file, f"its header claims {length:,} bytes of a file of {size:,}")
            raw = stream.read(length)
    except OSError as error:
        raise ZooError(f"cannot read {file}: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is no JSON object: {str(error)[:80]}") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    found, ends = {}, 0
    for name, item in sorted(header.items(), key=lambda pair: _begin(pair[1])):
        dtype, shape, begin, end = _entry(file, name, item)
        if begin != ends or end - begin != math.prod(shape) * SIZES[dtype]:
            raise _damaged(file, f"'{name}' of shape {list(shape)} does not have its place in it")
        found[name], ends = (dtype, shape), end
    if ends != size - 8 - length:
        raise _damaged(file, f"its header describes {ends:,} bytes of values and it holds {size - 8 - length:,}")
    return found


def values(header: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * SIZES[dtype] for dtype, shape in header.values())


def _entry(file: Path, name: str, item: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(item, dict):
        raise _damaged(file, f"the entry '{name}' is no tensor")
    dtype, shape, place = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    whole = lambda numbers: isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if (
        not isinstance(dtype, str)
        or dtype not in SIZES
        or not whole(shape)
        or not whole(place)
        or len(place) != 2
        or place[1] < place[0]
    ):
        raise _damaged(file, f"the entry '{name}' is no tensor")
    return dtype, tuple(shape), place[0], place[1]


def _begin(item: Any) -> tuple[int, int]:
    place = item.get("data_offsets") if isinstance(item, dict) else None
    good = isinstance(place, list) and len(place) == 2 and all(type(n) is int for n in place)
    return (place[0], place[1]) if good else (-1, -1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _damaged(file: Path, why: str) -> ZooError:
    return ZooError(f"{file} is damaged or no safetensors file ({why}): download it again")
