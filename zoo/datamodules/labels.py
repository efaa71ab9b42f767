"""Label columns to arrays: classes by number or name, several 0/1 columns, or numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules.table import Table
from zoo.errors import ZooError, nearest

_LARGEST = float(np.finfo(np.float32).max)
_SPARE = 1000  # class numbers that no sample has; more of them are numbers that are no classes


def class_names(table: Table, column: str, given: Sequence[str]) -> tuple[str, ...]:
    """The classes in index order: *given*, else those of the training labels (numbers keep their meaning).

    Raises:
        ZooError: a row without a label, or numbers too large to count classes.
    """
    if given:
        return tuple(given)
    values = [value.strip() for value in table.column(column, "label")]
    found = set(values)
    if "" in found:
        raise ZooError(f"{table.place(values.index(''))}: label is empty")
    if all(value.isdecimal() for value in found):
        largest = max(map(int, found))
        if largest > len(found) + _SPARE:
            raise ZooError(
                f"'{table.path}': the column '{column}' holds numbers up to {largest}, too large for classes: set "
                "data.task=regression, or name the classes in data.classes"
            )
        return tuple(str(i) for i in range(largest + 1))
    return tuple(sorted(found))


def _index(classes: Sequence[str]) -> dict[str, int]:
    """Name -> index. A number means an index too, unless the names themselves are numbers (1 and 2, say)."""
    numbered = not all(name.isdecimal() for name in classes)
    return ({str(i): i for i in range(len(classes))} if numbered else {}) | {name: i for i, name in enumerate(classes)}


def multiclass(table: Table, column: str, classes: Sequence[str]) -> NDArray[np.int64]:
    """Class indices [N]; a label is a class's name or, if it is no name, its number.

    Raises:
        ZooError: a label that is neither, naming the row.
    """
    index = _index(classes)
    values = [value.strip() for value in table.column(column, "label")]
    try:
        return np.array([index[value] for value in values], np.int64)
    except KeyError:
        row = next(i for i, value in enumerate(values) if value not in index)
        what = "is empty" if not values[row] else f"'{values[row]}' is none of the {len(classes)} classes"
        raise ZooError(f"{table.place(row)}: label {what}" + nearest(values[row], classes)) from None


def multilabel(table: Table, columns: Sequence[str], classes: Sequence[str]) -> NDArray[np.float32]:
    """[N, K] of 0 and 1: from K columns, or from one column of class names (or numbers) separated by ';'.

    Raises:
        ZooError: a value that is not 0 or 1, or a name that is no class.
    """
    if len(columns) == 1 and len(classes) > 1:
        index = _index(classes)
        out = np.zeros((len(table), len(classes)), np.float32)
        for row, value in enumerate(table.column(columns[0], "label")):
            for part in filter(None, (piece.strip() for piece in value.split(";"))):
                if part not in index:
                    raise ZooError(f"{table.place(row)}: '{part}' is none of the classes" + nearest(part, classes))
                out[row, index[part]] = 1
        return out
    values = regression(table, columns)
    values = values.reshape(len(values), -1)
    wrong = np.argwhere((values != 0) & (values != 1))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise ZooError(f"{table.place(row)}: '{columns[column]}' must be 0 or 1, got {values[row, column]:g}")
    return values


def regression(table: Table, columns: Sequence[str]) -> NDArray[np.float32]:
    """[N] or, with several columns, [N, K] numbers.

    Raises:
        ZooError: a value that is no finite number, naming the row and column.
    """
    out = np.empty((len(table), len(columns)), np.float32)
    for k, name in enumerate(columns):
        for row, value in enumerate(table.column(name, "label")):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or abs(number) > _LARGEST:
                raise ZooError(f"{table.place(row)}: '{name}' must be a finite number, got '{value}'")
            out[row, k] = number
    return out[:, 0] if len(columns) == 1 else out


def held_out(texts: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Marks [N] of the rows for validation: seeded, about *fraction* of them; equal sequences are never parted."""
    size = max(1, round(fraction * len(texts)))
    left, chosen, count = Counter(texts), set(), 0
    for row in np.random.default_rng([0, len(texts)]).permutation(len(texts)):
        if count >= size:
            break
        count += left.pop(texts[row], 0)
        chosen.add(texts[row])
    return np.array([text in chosen for text in texts], np.bool_)


def folds(labels: NDArray[np.generic], count: int, seed: int, texts: Sequence[str] = ()) -> NDArray[np.int64]:
    """Fold number [N] of each sample: seeded, and with class labels each class is spread evenly.

    Equal *texts* go to one fold, that of the first of them.
    """
    generator = np.random.default_rng([seed & (2**63 - 1), count])
    order = generator.permutation(len(labels))
    if labels.ndim == 1 and labels.dtype.kind == "i":
        order = order[np.argsort(labels[order], kind="stable")]
    out = np.empty(len(labels), np.int64)
    out[order] = np.arange(len(labels)) % count
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        out[row] = out[first.setdefault(text, row)]
    return out
