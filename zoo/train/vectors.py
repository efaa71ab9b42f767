"""Files of vectors: NumPy's `.npz`, or Parquet, which tables and other languages read; both appear when complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError

Vectors = Iterable[tuple[str, NDArray[np.float32]]]
GROUP = 1024  # sequences a row group


def parquet() -> Any:
    """The module pyarrow.

    Raises:
        ZooError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ZooError("Parquet files need pyarrow: pip install 'seqzoo[parquet]', or write .npz") from None
    return pyarrow


def write_npz(target: Path, found: Vectors, per_base: bool) -> None:
    """`names` [N] and `embeddings` [N, D]; with *per_base* `embeddings` [all letters, D] and `lengths` [N].

    Raises:
        ZooError: the file cannot be written.
    """
    pairs = list(found)
    names, vectors = [name for name, _ in pairs], [vector for _, vector in pairs]
    arrays: dict[str, Any] = {"names": np.array(names)}
    if per_base:
        arrays |= {"embeddings": np.concatenate(vectors), "lengths": np.array([len(v) for v in vectors])}
    else:
        arrays["embeddings"] = np.stack(vectors)
    temporary = target.with_name(f".{target.name}.partial.npz")
    try:
        np.savez(temporary, **arrays)
        temporary.replace(target)
    except OSError as error:
        raise ZooError(f"cannot write '{target}': {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_parquet(
    target: Path, found: Vectors, letters: Sequence[bytes] | None = None, about: dict[str, str] | None = None
) -> None:
    """Columns `name` and `embedding` (a list of D float32), a row a sequence, written as they come.

    Args:
        target: the file.
        found: names and vectors [D], or [letters, D] of single letters.
        letters: the sequences, for vectors of single letters: a row a letter with its `position` (from 0) and `base`.
        about: kept in the file's metadata.

    Raises:
        ZooError: pyarrow is missing, or the file cannot be written.
    """
    pa = parquet()
    temporary = target.with_name(f".{target.name}.partial")
    writer = None
    try:
        for chunk, texts in _groups(found, letters):
            table = _pooled(pa, chunk) if texts is None else _letters(pa, chunk, texts)
            if writer is None:
                schema = table.schema.with_metadata({**(about or {}), **(table.schema.metadata or {})})
                writer = pa.parquet.ParquetWriter(temporary, schema, compression="zstd")
            writer.write_table(table.cast(writer.schema))
        if writer is not None:
            writer.close()
            temporary.replace(target)
    except OSError as error:
        raise ZooError(f"cannot write '{target}': {error.strerror or error}") from None
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)


def _groups(found: Vectors, letters: Sequence[bytes] | None) -> Iterator[tuple[list[Any], Sequence[bytes] | None]]:
    stream, start = iter(found), 0
    while chunk := list(islice(stream, GROUP if letters is None else 16)):
        yield chunk, None if letters is None else letters[start : start + len(chunk)]
        start += len(chunk)


def _column(pa: Any, vectors: NDArray[np.float32]) -> Any:
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _pooled(pa: Any, chunk: list[tuple[str, NDArray[np.float32]]]) -> Any:
    names = pa.array([name for name, _ in chunk], pa.string())
    return pa.table({"name": names, "embedding": _column(pa, np.stack([vector for _, vector in chunk]))})


def _letters(pa: Any, chunk: list[tuple[str, NDArray[np.float32]]], texts: Sequence[bytes]) -> Any:
    lengths = [len(vectors) for _, vectors in chunk]
    joined = b"".join(texts).decode("latin-1")
    return pa.table(
        {
            "name": pa.array(np.repeat([name for name, _ in chunk], lengths), pa.string()),
            "position": pa.array(np.concatenate([np.arange(n) for n in lengths]), pa.int64()),
            "base": pa.array(list(joined), pa.string()),
            "embedding": _column(pa, np.concatenate([vectors for _, vectors in chunk])),
        }
    )
