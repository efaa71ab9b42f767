"""`zoo score`: how likely a language model finds sequences."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import Any

from zoo.cli.common import Parser, write_rows
from zoo.cli.sequences import add_batch, add_input, check


def parser() -> Parser:
    command = Parser(
        "score",
        "Log-likelihood (natural logarithm) of each sequence, and its mean a base; with --per-token one line a token.\n"
        "Causal models predict each token from those before it; masked models from all others, one pass a token\n"
        "(pseudo-likelihood). Tokens that are not A, C, G, T are not counted.",
        [
            "zoo score runs/ecoli/artifact --fasta sequences.fa",
            "zoo score hyenadna-tiny-1k --csv table.csv --column seq --out scores.csv",
            "zoo score runs/ecoli/artifact --fasta sequences.fa --per-token --out tokens.tsv",
        ],
    )
    add_input(command)
    command.add_argument("--per-token", action="store_true", help="one line a token (a base, for letter tokenizers)")
    command.add_argument("-o", "--out", metavar="FILE", help="write there rather than to stdout")
    add_batch(command, 32)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    from zoo.cli.predict import read

    names, sequences = read(args)
    from zoo.train.embed import score

    found = score(args.ref, zip(names, sequences, strict=True), batch_size=args.batch_size)
    if args.per_token:
        write_rows(list(_tokens(found)), ["name", "start", "end", "log_likelihood"], args.out)
    else:
        header = ["name", "tokens", "bases", "log_likelihood", "per_base", "bits_per_base"]
        write_rows(list(_totals(found)), header, args.out)
    return 0


def _totals(found: Iterable[Any]) -> Iterator[list[str]]:
    for one in found:
        bases = int(one.bases.sum())
        mean = one.total / bases if bases else math.nan
        yield [
            one.name, str(len(one.tokens)), str(bases),
            f"{one.total:.4f}", f"{mean:.6f}", f"{-mean / math.log(2):.6f}",
        ]  # fmt: skip


def _tokens(found: Iterable[Any]) -> Iterator[list[str]]:
    for one in found:
        for (start, end), value, bases in zip(one.spans, one.tokens, one.bases, strict=True):
            if bases:
                yield [one.name, str(start), str(end), f"{value:.6f}"]
