"""Sequences with labels from CSV, TSV, FASTA and folders: rows of text, nothing interpreted yet."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path

from zoo.datamodules.fasta import read_fasta
from zoo.datamodules.manifest import opened
from zoo.errors import ZooError, nearest


@dataclass
class Table:
    """Rows of one file.

    Attributes:
        path: the file.
        columns: column name -> one string a row.
        first_line: line number of the first row, for messages (1-based).
    """

    path: Path
    columns: dict[str, list[str]] = field(default_factory=dict)
    first_line: int = 2

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, what: str) -> list[str]:
        """One column.

        Raises:
            ZooError: no such column, with the nearest one; *what* is the config key that named it.
        """
        if name not in self.columns:
            raise ZooError(f"'{self.path}' has no column '{name}' ({what})" + nearest(name, self.columns))
        return self.columns[name]

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"'{self.path}' row {row + 1}"


def read_table(path: Path, format: str = "auto", separator: str = "|") -> Table:
    """Read a labelled file.

    Args:
        path: the file, plain or gzip-compressed.
        format: `csv`, `tsv`, `fasta`, `folder` or `auto` (by the file's name).
        separator: in FASTA headers, what stands between the name and the label: `>name|label`.

    Raises:
        ZooError: not readable in that format, ragged, or without rows.
    """
    if format == "folder":
        return _folder(path)
    kind = _format(path) if format == "auto" else format
    table = _fasta(path, separator) if kind == "fasta" else _delimited(path, "\t" if kind == "tsv" else ",")
    if not len(table):
        raise ZooError(f"'{path}' holds no rows")
    return table


def read_sequences(path: Path, column: str) -> list[bytes]:
    """The sequences of a FASTA file, or of one column of a CSV or TSV file; empty ones are left out.

    Raises:
        ZooError: not readable, or without sequences.
    """
    if _format(path) == "fasta":
        found = [sequence for _, sequence in read_fasta(path)]
    else:
        found = [text.strip().encode("latin-1", "replace") for text in read_table(path).column(column, "sequence")]
    kept = [text for text in found if text]
    if not kept:
        raise ZooError(f"'{path}' holds no sequences")
    return kept


def _format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".fa", ".fasta", ".fna", ".ffn")):
        return "fasta"
    return "tsv" if name.endswith((".tsv", ".tab", ".txt")) else "csv"


def _delimited(path: Path, delimiter: str) -> Table:
    old = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a chromosome is one field
    try:
        with opened(path) as raw:
            reader = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
            header = next(reader, None)
            if not header:
                raise ZooError(f"'{path}' is empty")
            rows = [row for row in reader if row]
    except UnicodeDecodeError:
        raise ZooError(f"'{path}' is not a text file") from None
    except csv.Error as error:
        raise ZooError(f"'{path}' is not a valid table: {error}") from None
    finally:
        csv.field_size_limit(old)
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ZooError(f"'{path}' row {number + 1} has {len(row)} fields, its header has {len(header)}")
    names = [name.strip() for name in header]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ZooError(f"'{path}' has two columns '{twice}'; rename one of them")
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)})


def _folder(path: Path) -> Table:
    """`<path>/<class>/<anything>`, one sequence a file."""
    files = sorted(file for file in path.glob("*/*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise ZooError(f"'{path}' holds no files of the layout <class>/<file>, one sequence a file")
    columns = {
        "name": [file.stem for file in files],
        "sequence": ["".join(file.read_text(encoding="latin-1").split()) for file in files],
        "label": [file.parent.name for file in files],
    }
    return Table(path, columns)


def _fasta(path: Path, separator: str) -> Table:
    names, labels, sequences = [], [], []
    for header, sequence in read_fasta(path):
        name, found, label = header.rpartition(separator)
        if not found:
            raise ZooError(f"'{path}' record '{header}' has no label (expected '>name{separator}label')")
        names.append(name.strip())
        labels.append(label.strip())
        sequences.append(sequence.decode("latin-1"))
    return Table(path, {"name": names, "sequence": sequences, "label": labels})
