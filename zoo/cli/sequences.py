"""The options of commands that read sequences: where they come from, where results go, how many at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser
from zoo.errors import ZooError


def add_input(command: Parser, *, table: bool = True) -> None:
    """REF and --fasta; with *table* also --csv and --column."""
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    source = command.add_mutually_exclusive_group(required=True) if table else command
    required = {} if table else {"required": True}
    source.add_argument("--fasta", metavar="FILE", help="sequences, plain or gzip-compressed", **required)
    if table:
        source.add_argument("--csv", metavar="FILE", help="table with a column of sequences (.csv or .tsv)")
        command.add_argument("--column", default="sequence", help="that column (default: sequence)")


def add_batch(command: Parser, size: int) -> None:
    """--batch-size."""
    command.add_argument("--batch-size", type=int, default=size, help=f"sequences at a time (default: {size})")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything heavy is imported.

    Raises:
        ZooError: REF is nowhere, a batch of nothing, or a folder of --out that does not exist.
    """
    from zoo.cli.finetune import check_ref

    check_ref(args.ref)
    if getattr(args, "batch_size", 1) < 1:
        raise ZooError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.out is not None and not Path(args.out).expanduser().parent.is_dir():
        raise ZooError(f"folder '{Path(args.out).parent}' of --out does not exist")
