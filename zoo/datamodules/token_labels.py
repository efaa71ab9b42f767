"""One label for every base: strings of class letters as long as their sequences, turned into labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules.table import Table
from zoo.errors import ZooError, nearest
from zoo.tokenizers.base import Tokenizer

IGNORED = -100  # the target that cross entropy leaves out
BLANK = "."  # a base without a label


def letters(values: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """The classes in index order: *given*, else the letters that occur in the training labels."""
    return tuple(given) or tuple(sorted(set().union(*values) - {BLANK}))


def per_base(table: Table, column: str, sequence: str, classes: Sequence[str]) -> NDArray[np.object_]:
    """[N] arrays of class indices, -100 where the label is '.'.

    Raises:
        ZooError: a label string that is not as long as its sequence, or a letter that is no class.
    """
    wrong = -1
    lookup = np.full(256, wrong, np.int64)
    for i, name in enumerate(classes):
        if len(name) != 1:
            raise ZooError(f"classes of labels per base are single letters, got '{name}'")
        lookup[ord(name)] = i
    lookup[ord(BLANK)] = IGNORED
    out = np.empty(len(table), object)
    texts = ["".join(text.split()) for text in table.column(sequence, "sequence")]
    for row, value in enumerate(table.column(column, "label")):
        if len(value) != len(texts[row]):
            raise ZooError(f"{table.place(row)}: {len(value)} labels for {len(texts[row])} bases")
        out[row] = lookup[np.frombuffer(value.encode("latin-1", "replace"), np.uint8)]
        if (out[row] == wrong).any():
            letter = value[int((out[row] == wrong).argmax())]
            raise ZooError(f"{table.place(row)}: label '{letter}' is none of the classes" + nearest(letter, classes))
    return out


def per_token(tokenizer: Tokenizer, text: bytes, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Labels of the tokens of `encode(text, add_special=False)`: the commonest of each token's bases, -100 if none."""
    spans = tokenizer.offsets(text, add_special=False)
    hot = np.zeros((len(labels) + 1, classes), np.int64)
    real = np.flatnonzero(labels >= 0)
    hot[real + 1, labels[real]] = 1
    total = hot.cumsum(0)
    counts = total[spans[:, 1]] - total[spans[:, 0]]  # [tokens, classes]
    return np.where(counts.sum(1) > 0, counts.argmax(1), IGNORED)


def place(
    rows: Sequence[NDArray[Any]], valid: NDArray[np.bool_], before: int, behind: int, truncate: str
) -> NDArray[np.int64]:
    """Token labels [B, L] beside ids whose real tokens are *valid*, special tokens, padding and cut tokens left out."""
    out = np.full(valid.shape, IGNORED, np.int64)
    for i, row in enumerate(rows):
        real = np.flatnonzero(valid[i])
        inner = real[before : len(real) - behind]
        kept = row[len(row) - len(inner) :] if truncate == "left" else row[: len(inner)]
        out[i, inner] = kept
    return out


def covering(
    spans: NDArray[np.int64], bases: int, valid: NDArray[np.bool_], before: int, behind: int, truncate: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of *bases* the place in a row of the token that covers it, and the base's place in that token; or -1.

    Args:
        spans: [T, 2] start and end of the tokens in the text, special ones left out.
        bases: length of the text.
        valid: [L] the real tokens of the row.
        before, behind: special tokens at its ends.
        truncate: the side from which tokens were cut where the row has fewer than T.
    """
    real = np.flatnonzero(valid)
    inner = real[before : len(real) - behind]
    lost = len(spans) - len(inner) if truncate == "left" else 0
    token, place = np.full(bases, -1, np.int64), np.full(bases, -1, np.int64)
    for where, (start, end) in zip(inner, spans[lost : lost + len(inner)], strict=True):
        token[start:end] = where
        place[start:end] = np.arange(end - start)
    return token, place


def stack(rows: Sequence[NDArray[Any]], fill: int) -> NDArray[np.int64]:
    """Rows of unlike lengths as [B, longest], filled up on the right."""
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
