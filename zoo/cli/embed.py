"""`zoo embed`: vectors of sequences."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser
from zoo.cli.sequences import add_batch, add_input, check
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "embed",
        "The model's last hidden states as a NumPy file: `names` [N] and `embeddings` [N, D]. With --pool base one\n"
        "vector a letter: `embeddings` [all letters, D] and `lengths` [N], the letters of each sequence.\n"
        "As Parquet (needs pyarrow: pip install 'seqzoo[parquet]'): columns `name`, `embedding`, and with --pool base\n"
        "a row a letter with `position` (from 0) and `base`. Sequences of similar length are read together. A model\n"
        "of pairs is refused.",
        [
            "zoo embed runs/ecoli/artifact --fasta sequences.fa --out vectors.npz",
            "zoo embed hyenadna-tiny-1k --csv table.csv --column seq --pool last --out vectors.parquet",
            "zoo embed runs/ecoli/artifact --fasta sequences.fa --pool base --out bases.npz",
        ],
    )
    add_input(command)
    command.add_argument("-o", "--out", metavar="FILE", required=True, help="where to write (.npz or .parquet)")
    command.add_argument(
        "--pool",
        default="mean",
        choices=("mean", "last", "first", "cls", "base"),
        help="the mean, last or first of the tokens that are no padding, the [CLS] token, or one vector a letter "
        "(default: mean)",
    )
    add_batch(command, 256)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    target = Path(args.out).expanduser()
    if target.suffix not in (".npz", ".parquet"):
        raise ZooError(
            f"--out writes NumPy's format or Parquet, so its name must end in .npz or .parquet: '{args.out}'"
        )
    from zoo.train.vectors import parquet, write_npz, write_parquet

    if target.suffix == ".parquet":
        parquet()  # missing, it is said before anything is computed
    from zoo.cli.predict import read

    names, sequences = read(args)
    from zoo.train.embed import embed

    found = embed(args.ref, zip(names, sequences, strict=True), args.pool, batch_size=args.batch_size)
    if target.suffix == ".npz":
        write_npz(target, found, args.pool == "base")
    else:
        about = {"model": args.ref, "pool": args.pool}
        write_parquet(target, found, sequences if args.pool == "base" else None, about)
    return 0
