"""`zoo mutagenesis`: what every substitution of a sequence does to a model's output."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.cli.common import Parser, existing_file, write_rows
from zoo.cli.sequences import add_batch, check
from zoo.errors import ZooError, nearest

if TYPE_CHECKING:
    from zoo.train.mutagenesis import Mutagenesis

MOST = 5000  # positions without a word


def parser() -> Parser:
    command = Parser(
        "mutagenesis",
        "Replace each base by the three others (in-silico saturation mutagenesis). A classifier gives the change of\n"
        "the log-odds and the probability of one class, a regression that of its value, a causal language model the\n"
        "log-likelihood ratio, a masked one the masked marginal. For each sequence DIR gets NAME.tsv and NAME.png, a\n"
        "heat map of all substitutions below a sequence logo: of language models the information content (bits) of\n"
        "the base's law at each place, otherwise the reference letter as high as its substitutions lower the output.",
        [
            "zoo mutagenesis runs/splice/artifact --fasta site.fa --class donor -o runs/site",
            "zoo mutagenesis hyenadna-tiny-1k --fasta promoters.fa --strand both -o runs/promoters",
            "zoo mutagenesis runs/ecoli/artifact --fasta genome.fa.gz --region U00096:366300-366420 -o runs/lac",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_argument("--fasta", metavar="FILE", required=True, help="sequences, plain or gzip-compressed")
    command.add_argument("--region", metavar="NAME:START-END", help="mutate these positions alone (from 1, both ends "
                         "included), read in their surroundings")  # fmt: skip
    command.add_argument("-o", "--out", metavar="DIR", required=True, help="folder to write; must not hold anything")
    command.add_argument("--class", dest="target", metavar="NAME", help="class or output that is followed (default: "
                         "the one that is predicted)")  # fmt: skip
    command.add_argument("--window", type=int, metavar="BASES", help="bases read around a position (default: the "
                         "whole sequence as far as the model takes it, at most 8192)")  # fmt: skip
    command.add_argument(
        "--strand", choices=("+", "-", "both"), default="+", help="strand that is read; both: the mean"
    )
    add_batch(command, 64)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    target = Path(args.out).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ZooError(f"'{args.out}' exists and is not an empty folder: choose another name")
    from zoo.datamodules.fasta import Genome

    genome = Genome([existing_file(args.fasta, "FASTA file")])
    regions = [_region(args.region, genome)] if args.region else [
        (name, 0, record.length) for name, record in genome.records.items()
    ]  # fmt: skip
    count = sum(end - start for _, start, end in regions)
    if count > MOST:
        raise ZooError(
            f"'{args.fasta}' holds {count:,} positions, which are {3 * count:,} substitutions: choose at most {MOST:,} "
            "with --region NAME:START-END"
        )
    from zoo.train.mutagenesis import Mutagen

    mutagen = Mutagen(args.ref, args.target, args.window, args.strand, batch_size=args.batch_size)
    with _folder(target) as place:
        taken: set[str] = set()
        for name, start, end in regions:
            text = genome.read(name).tobytes()
            found = mutagen(name, text, start, end)
            stem = _stem(name, taken)
            write_rows(_rows(found), ["name", "position", "ref", "alt", *found.changes], str(place / f"{stem}.tsv"))
            _draw(found, place / f"{stem}.png", args)
            about = f", class {found.target}" if found.target else ""
            print(f"{target / stem}.tsv, .png: {len(found.reference)} positions ({found.measure}{about})")
    return 0


def _region(text: str, genome: object) -> tuple[str, int, int]:
    records = genome.records  # type: ignore[attr-defined]
    found = re.fullmatch(r"(.+):([\d,]+)-([\d,]+)", text)
    if found is None:
        raise ZooError(f"--region must look like NAME:START-END, as in chr1:1,001-1,100, got '{text}'")
    name, start, end = found[1], int(found[2].replace(",", "")), int(found[3].replace(",", ""))
    if name not in records:
        raise ZooError(f"the FASTA file has no sequence '{name}' (--region)" + nearest(name, records))
    length = records[name].length
    if not 1 <= start <= end <= length:
        raise ZooError(f"--region {text} is not within 1 to {length} of '{name}', or ends before it starts")
    return name, start - 1, end


def _stem(name: str, taken: set[str]) -> str:
    """A file name for a sequence name; another one for each."""
    base = re.sub(r"[^\w.-]+", "_", name).strip(".") or "sequence"
    stem, number = base, 2
    while stem.lower() in taken:
        stem, number = f"{base}_{number}", number + 1
    taken.add(stem.lower())
    return stem


def _rows(found: Mutagenesis) -> Iterator[list[str]]:
    import numpy as np

    from zoo.train.mutagenesis import LETTERS

    for i, letter in enumerate(found.reference):
        for j, other in enumerate(LETTERS):
            values = [float(table[i, j]) for table in found.changes.values()]
            if other != letter and np.isfinite(values).all():
                position = str(found.start + i + 1)
                yield [found.name, position, chr(letter), chr(other), *(f"{value:.6g}" for value in values)]


def _draw(found: Mutagenesis, picture: Path, args: argparse.Namespace) -> None:
    from zoo.train.logo import plot_mutagenesis
    from zoo.train.mutagenesis import meaning

    measure = meaning(found.measure)
    what = f"{measure} of {found.target}" if found.target else measure
    plot_mutagenesis(
        picture,
        found.reference,
        found.changes[found.measure],
        first=found.start + 1,
        kind="information" if found.is_law else "importance",
        title=f"{found.name}: {what}",
        label=measure,
    )


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder that appears when it is complete."""
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise ZooError(f"cannot write '{target}': {error.strerror}") from None
    try:
        place.chmod(0o755)
        yield place
        if target.is_dir():
            target.rmdir()
        place.rename(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
