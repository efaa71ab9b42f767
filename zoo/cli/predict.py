"""`zoo predict`: what an artifact says of each sequence of a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, existing_file, write_rows
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact

Rows = list[list[str]]


def parser() -> Parser:
    command = Parser(
        "predict",
        "One line for each sequence: class and probabilities, targets, or bits per base of a language model (of a\n"
        "masked one pseudo_bits_per_base, one pass a token).\n"
        "Tab-separated on stdout, or in the file --out (comma-separated where its name ends in .csv).",
        [
            "zoo predict runs/hyenadna_uci_splice/artifact --fasta sequences.fa",
            "zoo predict runs/hyenadna_uci_splice/artifact --csv table.csv --column seq --out predictions.csv",
            "zoo predict hyenadna-tiny-1k --fasta sequences.fa",
            "zoo predict runs/mqt_easy_vqa/artifact --image shape.png --question 'what color is the shape?'",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--fasta", metavar="FILE", help="sequences, plain or gzip-compressed")
    source.add_argument("--csv", metavar="FILE", help="table with a column of sequences (.csv or .tsv)")
    source.add_argument("--image", nargs="+", metavar="FILE", help="pictures, for a vision-language model")
    command.add_argument("--question", metavar="TEXT", help="what to ask about each picture")
    command.add_argument("--tokens", type=int, default=0, metavar="M", help="visual tokens a picture (default: all)")
    command.add_argument("--column", default="sequence", help="that column (default: sequence)")
    command.add_argument("--column2", metavar="NAME", help="column of the second sequences, for a model of pairs")
    command.add_argument("-o", "--out", metavar="FILE", help="write there rather than to stdout")
    command.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: 32)")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.cli.finetune import check_ref

    check_ref(args.ref)
    if args.batch_size < 1:
        raise ZooError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.column2 is not None and args.csv is None:
        raise ZooError("--column2 names a column of a table: give the table with --csv")
    if args.out is not None and not Path(args.out).expanduser().parent.is_dir():
        raise ZooError(f"folder '{Path(args.out).parent}' of --out does not exist")
    if args.image:
        from zoo.cli import answer

        return answer.run(args)
    names, sequences = read(args)
    given: list[Any] = [*sequences]
    if args.column2 is not None:
        _, mates = read(argparse.Namespace(fasta=None, csv=args.csv, column=args.column2))
        given = [*zip(sequences, mates, strict=True)]
    from zoo.hub import artifact

    header, rows = predict(artifact.load(args.ref), names, given, args.batch_size)
    write_rows(rows, header, args.out)
    return 0


def read(args: argparse.Namespace) -> tuple[list[str], list[bytes]]:
    """Names and sequences of the input file.

    Raises:
        ZooError: missing, empty, of another format, or without the column.
    """
    if args.fasta is not None:
        from zoo.datamodules.fasta import read_fasta

        records = list(read_fasta(existing_file(args.fasta, "FASTA file")))
        names = [header.split()[0] if header.split() else f"sequence_{i + 1}" for i, (header, _) in enumerate(records)]
        sequences = [sequence for _, sequence in records]
        place = args.fasta
    else:
        from zoo.datamodules.table import read_table

        found = read_table(existing_file(args.csv, "table"))
        sequences = [text.strip().encode("latin-1", "replace") for text in found.column(args.column, "--column")]
        labels = next((found.columns[key] for key in ("id", "name") if key in found.columns), None)
        names = labels or [str(i + 1) for i in range(len(sequences))]
        place = args.csv
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise ZooError(f"sequence '{name}' of '{place}' is empty")
    return names, sequences


def predict(found: Artifact, names: list[str], sequences: list[Any], batch_size: int) -> tuple[list[str], Rows]:
    """(header, rows) in the order of the input.

    Raises:
        ZooError: no tokenizer, or a sequence longer than the model takes; names both numbers.
    """
    from zoo.train.predict import predict as rows_of

    rows = list(rows_of(found, zip(names, sequences, strict=True), batch_size=batch_size))
    header = list(rows[0]) if rows else ["name"]
    return header, [[_shown(key, value) for key, value in row.items()] for row in rows]


def _shown(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.4f}" if key.startswith("p_") or key.endswith(("bits_per_base", "log_likelihood")) else f"{value:.6g}"
    )
