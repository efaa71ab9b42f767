"""`zoo embed`: vectors of sequences."""

from __future__ import annotations

import argparse

from zoo.cli.common import Parser
from zoo.cli.sequences import add_batch, add_input, check
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "embed",
        "The model's last hidden states as a NumPy file: `names` [N] and `embeddings` [N, D]. With --pool base one\n"
        "vector a letter: `embeddings` [all letters, D] and `lengths` [N], the letters of each sequence.",
        [
            "zoo embed runs/ecoli/artifact --fasta sequences.fa --out vectors.npz",
            "zoo embed hyenadna-tiny-1k --csv table.csv --column seq --pool last --out vectors.npz",
            "zoo embed runs/ecoli/artifact --fasta sequences.fa --pool base --out bases.npz",
        ],
    )
    add_input(command)
    command.add_argument("-o", "--out", metavar="FILE", required=True, help="where to write (.npz)")
    command.add_argument(
        "--pool",
        default="mean",
        choices=("mean", "last", "first", "base"),
        help="the mean, last or first of the tokens that are no padding, or one vector a letter (default: mean)",
    )
    add_batch(command, 256)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    if not args.out.endswith(".npz"):
        raise ZooError(f"--out writes NumPy's format, so its name must end in .npz, got '{args.out}'")
    from pathlib import Path

    from zoo.cli.predict import read

    names, sequences = read(args)
    import numpy as np

    from zoo.train.embed import embed

    pairs = zip(names, sequences, strict=True)
    vectors = [vector for _, vector in embed(args.ref, pairs, args.pool, batch_size=args.batch_size)]
    arrays = {"names": np.array(names)}
    if args.pool == "base":
        arrays |= {"embeddings": np.concatenate(vectors), "lengths": np.array([len(v) for v in vectors])}
    else:
        arrays["embeddings"] = np.stack(vectors)
    target = Path(args.out).expanduser()
    temporary = target.with_name(f".{target.name}.partial.npz")
    try:
        np.savez(temporary, **arrays)
        temporary.replace(target)
    except OSError as error:
        raise ZooError(f"cannot write '{args.out}': {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return 0
