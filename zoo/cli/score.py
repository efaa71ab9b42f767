"""`zoo score`: how likely a language model finds sequences."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from zoo.cli.common import Parser, write_rows
from zoo.cli.sequences import add_batch, add_input, check
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "score",
        "Log-likelihood (natural logarithm) of each sequence, and its mean a base; with --per-token one line a token.\n"
        "Causal models predict each token from those before it. Masked models predict it from all others, one pass\n"
        "a token: their columns are pseudo_log_likelihood and so on, which compare with each other but not with a\n"
        "causal model's. Letters that the tokenizer reads as no token of A, C, G and T (N, IUPAC codes, for most\n"
        "models lower case) are not counted, and a line on stderr says how many there are; with --unknown error they\n"
        "are refused. A sequence of which nothing is counted has nan a base.",
        [
            "zoo score runs/ecoli/artifact --fasta sequences.fa",
            "zoo score hyenadna-tiny-1k --csv table.csv --column seq --out scores.csv",
            "zoo score runs/ecoli/artifact --fasta sequences.fa --per-token --out tokens.tsv",
            "zoo score my-masked-model --fasta sequences.fa --mask-every 8",
        ],
    )
    add_input(command)
    command.add_argument("--per-token", action="store_true", help="one line a token (a base, for letter tokenizers)")
    command.add_argument("-o", "--out", metavar="FILE", help="write there rather than to stdout")
    command.add_argument("--mask-every", type=int, default=0, metavar="N", help="masked models: hide every N-th token "
                         "at once, N passes rather than one a token; approximate (default: one at a time)")  # fmt: skip
    command.add_argument("--unknown", choices=("skip", "error"), default="skip",
                         help="letters that are not counted, see above (default: skip)")  # fmt: skip
    add_batch(command, 32)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    if args.mask_every and args.mask_every < 2:
        raise ZooError(f"--mask-every must be at least 2, got {args.mask_every}")
    from zoo.cli.predict import read

    names, sequences = read(args)
    from zoo.train.embed import Reader, score

    reader = Reader(args.ref)
    if args.mask_every and reader.causal:
        raise ZooError(f"--mask-every is for masked models, but {reader.path} reads from left to right")
    pairs = zip(names, sequences, strict=True)
    unread: list[tuple[str, int]] = []
    scored = score(reader, pairs, batch_size=args.batch_size, mask_every=args.mask_every)
    found = _watched(scored, unread, args.unknown == "error", reader.tokenizer.name)
    kind = "" if reader.causal else "pseudo_"
    if args.per_token:
        write_rows(list(_tokens(found)), ["name", "start", "end", f"{kind}log_likelihood"], args.out)
    else:
        header = ["name", "tokens", "bases", f"{kind}log_likelihood", f"{kind}per_base", f"{kind}bits_per_base"]
        write_rows(list(_totals(found)), header, args.out)
    if unread:
        letters = sum(count for _, count in unread)
        print(
            f"letters that are not counted, as they lie in no token of A, C, G and T: {letters}, in {len(unread)} of "
            f"{len(names)} sequences (first in '{unread[0][0]}')",
            file=sys.stderr,
        )
    return 0


def _watched(found: Iterable[Any], unread: list[tuple[str, int]], refuse: bool, tokenizer: str) -> Iterator[Any]:
    """What passes through; (name, letters) of sequences with letters that are not counted are put down in *unread*."""
    for one in found:
        if one.unread and refuse:
            raise ZooError(
                f"sequence '{one.name}': the {tokenizer} tokenizer reads {one.unread} of its letters as no token of A, "
                "C, G and T: write it in upper case without N and IUPAC codes, in whole k-mers, or leave out "
                "--unknown error"
            )
        if one.unread:
            unread.append((one.name, one.unread))
        yield one


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
