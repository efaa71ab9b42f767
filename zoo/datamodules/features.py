"""Annotated sequences (GenBank, GFF3) to labelled sets: coding or not, and features by their type."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import numpy as np

from zoo.datamodules.augment import reverse_complement
from zoo.datamodules.fasta import read_fasta
from zoo.datamodules.manifest import opened
from zoo.errors import ZooError

if TYPE_CHECKING:
    from Bio.SeqFeature import CompoundLocation, SimpleLocation
    from Bio.SeqRecord import SeqRecord

GENES = ("CDS", "tRNA", "rRNA", "ncRNA", "tmRNA", "misc_RNA", "mRNA", "gene", "exon")


@dataclass(frozen=True)
class Feature:
    """One annotated feature.

    Attributes:
        kind: `CDS`, `tRNA`, ... as the file says.
        parts: (start, end) of its exons along the sequence, 0-based and half-open; a feature over the origin of a
            circular sequence begins with the part before the origin.
        strand: 1 or -1 (0 where the file names none).
        name: gene name, locus tag or ID, if any.
    """

    kind: str
    parts: tuple[tuple[int, int], ...]
    strand: int
    name: str = ""

    @property
    def start(self) -> int:
        """First base."""
        return self.parts[0][0]

    @property
    def end(self) -> int:
        """One past the last base."""
        return self.parts[-1][1]


@dataclass
class Annotated:
    """A sequence (upper case) and its features."""

    name: str
    sequence: bytes
    features: list[Feature] = field(default_factory=list)

    def of(self, feature: Feature, flank: int = 0) -> bytes:
        """The spliced sequence of a feature on its own strand, with *flank* bases of genome on either side."""
        inner = b"".join(self.sequence[start:end] for start, end in feature.parts)
        left = self.sequence[max(feature.start - flank, 0) : feature.start]
        text = left + inner + self.sequence[feature.end : feature.end + flank]
        return reverse_complement(text) if feature.strand < 0 else text


@dataclass(frozen=True)
class Row:
    """A labelled sequence and where it comes from (0-based, half-open)."""

    sequence: str
    label: str
    record: str
    start: int
    end: int
    strand: int


def read_annotated(path: str | Path, fasta: str | Path | None = None) -> list[Annotated]:
    """The records of a GenBank or GFF3 file, plain or gzip-compressed.

    Args:
        path: GenBank (read by Biopython) or GFF3, told apart by the first line.
        fasta: the sequences, for a GFF3 file that has no `##FASTA` section.

    Raises:
        ZooError: missing, neither of the two, broken, or without sequences.
    """
    place = Path(path)
    if not place.is_file():
        raise ZooError(f"annotation file '{place}' does not exist")
    with opened(place) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", "replace").read()
    if not text.strip():
        raise ZooError(f"annotation file '{place}' is empty")
    if text.startswith("LOCUS"):
        records = _genbank(place, text)
    elif text.startswith("##gff") or text.lstrip().split("\n")[0].count("\t") == 8:
        records = _gff(place, text, fasta)
    else:
        raise ZooError(f"'{place}' is neither GenBank (LOCUS ...) nor GFF3 (##gff-version 3)")
    if not any(record.features for record in records):
        raise ZooError(f"'{place}' has no features")
    return records


def _genbank(path: Path, text: str) -> list[Annotated]:
    from Bio import BiopythonParserWarning, SeqIO
    from Bio.Seq import UndefinedSequenceError

    try:
        with warnings.catch_warnings():
            # Biopython only warns when a file was cut off
            for message in ("Premature end", "Expected sequence length"):
                warnings.filterwarnings("error", message, BiopythonParserWarning)
            return [_record(record) for record in SeqIO.parse(io.StringIO(text), "genbank")]
    except UndefinedSequenceError:
        raise ZooError(f"'{path}' holds a record without its sequence") from None
    except (ValueError, TypeError, AttributeError, AssertionError, BiopythonParserWarning) as error:
        raise ZooError(f"'{path}' is not valid GenBank: {error}") from None


def _record(record: SeqRecord) -> Annotated:
    found = [
        Feature(
            feature.type,
            _along(feature.location),
            feature.location.strand or 0,
            next((feature.qualifiers[k][0] for k in ("gene", "locus_tag", "product") if k in feature.qualifiers), ""),
        )
        for feature in record.features
        # a part with a reference lies on another record
        if feature.location is not None and feature.type != "source" and not any(p.ref for p in feature.location.parts)
    ]
    length = len(record)
    for feature in found:
        if not all(0 <= start <= end <= length for start, end in feature.parts):
            raise ValueError(f"{feature.kind} {feature.name} lies outside '{record.id}' of {length} bases")
    found = [
        feature for feature in found if any(start < end for start, end in feature.parts)
    ]  # not a place between bases
    return Annotated(str(record.id), bytes(record.seq).upper(), found)  # type: ignore[arg-type]


def _along(location: SimpleLocation | CompoundLocation) -> tuple[tuple[int, int], ...]:
    """The parts in the order of the plus strand; Biopython gives them in the order of the feature's own strand."""
    parts = [(int(part.start), int(part.end)) for part in location.parts]
    return tuple(parts[::-1] if location.strand == -1 else parts)


def _gff(path: Path, text: str, fasta: str | Path | None) -> list[Annotated]:
    table, _, inner = text.partition("##FASTA")
    if fasta is not None:
        sequences = {_first_word(header, fasta): sequence.upper() for header, sequence in read_fasta(fasta)}
    else:
        sequences = {}
        for block in inner.split("\n>")[1:]:
            header, _, body = block.partition("\n")
            sequences[_first_word(header, path)] = "".join(body.split()).upper().encode("latin-1", "replace")
    if not sequences:
        raise ZooError(f"'{path}' has no ##FASTA section, so the FASTA file of its sequences must be given")
    records = {name: Annotated(name, sequence) for name, sequence in sequences.items()}
    joined: dict[tuple[str, str, str], int] = {}  # lines that share an ID are parts of one feature
    for number, line in enumerate(table.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 9 or not (columns[3].isdecimal() and columns[4].isdecimal()):
            raise ZooError(f"'{path}' line {number} is not GFF3 (nine columns, numbers in the fourth and fifth)")
        name, kind, start, end = unquote(columns[0]), columns[2], int(columns[3]) - 1, int(columns[4])
        if name not in records:
            raise ZooError(f"'{path}' line {number}: there is no sequence '{name}' in the FASTA")
        if not 0 <= start < end <= len(records[name].sequence):
            raise ZooError(f"'{path}' line {number}: {start + 1}-{end} lies outside '{name}'")
        tags = dict(part.split("=", 1) for part in columns[8].split(";") if "=" in part)
        strand = {"+": 1, "-": -1}.get(columns[6], 0)
        key, found = (name, kind, tags.get("ID", "")), records[name].features
        if key[2] and key in joined:
            old = found[joined[key]]
            found[joined[key]] = Feature(kind, tuple(sorted([*old.parts, (start, end)])), strand, old.name)
            continue
        joined[key] = len(found)
        label = next((unquote(tags[k]) for k in ("gene", "Name", "locus_tag", "ID") if k in tags), "")
        found.append(Feature(kind, ((start, end),), strand, label))
    return list(records.values())


def _first_word(header: str, path: str | Path) -> str:
    if not header.split():
        raise ZooError(f"'{path}' holds a sequence without a name")
    return header.split()[0]


def coding_windows(
    records: Sequence[Annotated],
    length: int,
    *,
    seed: int = 0,
    per_class: int = 0,
    positive: Sequence[str] = ("CDS",),
    occupied: Sequence[str] = GENES,
    labels: tuple[str, str] = ("0", "1"),
) -> list[Row]:
    """Windows inside coding features (label 1) and outside every feature (label 0), equally many, strand by coin.

    Args:
        records: annotated sequences.
        length: bases a window.
        seed: of the choice and the strand.
        per_class: windows of each label; 0: as many as the smaller class offers.
        positive: feature types that count as coding; a window lies within one exon.
        occupied: feature types that a negative window may not touch.
        labels: written for the two classes.

    Raises:
        ZooError: one class offers no window, or fewer than *per_class*.
    """
    generator = np.random.default_rng([seed & (2**63 - 1), length])
    places: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for number, record in enumerate(records):
        taken = np.zeros(len(record.sequence) + 1, np.int32)
        for feature in record.features:
            for start, end in feature.parts:
                if feature.kind in positive:
                    places[1].extend((number, s) for s in _tiles(start, end, length, generator))
                if feature.kind in occupied or feature.kind in positive:
                    taken[start] += 1
                    taken[end] -= 1
        for start, end in _gaps(np.cumsum(taken[:-1]) == 0):
            places[0].extend((number, s) for s in _tiles(start, end, length, generator))
    size = min(map(len, places))
    if size == 0 or size < per_class:
        counts = f"{len(places[1])} coding and {len(places[0])} other windows of {length} bases"
        raise ZooError(f"the annotation offers only {counts}" + (f", not {per_class} of each" if per_class else ""))
    rows = []
    for label, found in zip(labels, places, strict=True):
        for i in sorted(generator.permutation(len(found))[: per_class or size].tolist()):
            number, start = found[i]
            rows.append(_row(records[number], start, start + length, 1 - 2 * int(generator.integers(2)), label))
    return [rows[i] for i in generator.permutation(len(rows))]


def _row(record: Annotated, start: int, end: int, strand: int, label: str) -> Row:
    text = record.sequence[start:end]
    text = reverse_complement(text) if strand < 0 else text
    return Row(text.decode("latin-1"), label, record.name, start, end, strand)


def _tiles(start: int, end: int, length: int, generator: np.random.Generator) -> list[int]:
    """Starts of the windows that tile [start, end), the slack left over put before the first by chance."""
    count = (end - start) // length
    if count == 0:
        return []
    first = start + int(generator.integers(end - start - count * length + 1))
    return [first + i * length for i in range(count)]


def _gaps(free: np.ndarray) -> Iterator[tuple[int, int]]:
    edge = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
    yield from zip(edge[::2].tolist(), edge[1::2].tolist(), strict=True)


def feature_rows(records: Sequence[Annotated], kinds: Sequence[str], *, flank: int = 0, longest: int = 0) -> list[Row]:
    """The sequence of every feature of the given types, spliced, on its strand; the label is the type.

    Args:
        records: annotated sequences.
        kinds: feature types.
        flank: bases of genome kept on either side.
        longest: leave out features longer than this; 0 keeps all.

    Raises:
        ZooError: none of the types occurs; the types that do are named.
    """
    rows = []
    for record in records:
        for feature in record.features:
            if feature.kind in kinds:
                text = record.of(feature, flank).decode("latin-1")
                if not longest or len(text) <= longest:
                    rows.append(Row(text, feature.kind, record.name, feature.start, feature.end, feature.strand))
    if not rows:
        present = sorted({feature.kind for record in records for feature in record.features})
        raise ZooError(f"no feature of type {', '.join(kinds)}; the file has: {', '.join(present)}")
    return rows


def write_csv(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    by: Literal["position", "record"] = "position",
    fractions: tuple[float, float] = (0.7, 0.1),
) -> dict[str, Path]:
    """`train.csv`, `dev.csv` and `test.csv` with the columns of a labelled data set and the origin of each row.

    Args:
        rows: labelled sequences.
        folder: where they are written.
        by: `position` cuts each record at the fractions, so that neighbours are in one file, and leaves out rows that
            reach over a cut; `record` puts whole records into one file, the largest first where most is missing.
        fractions: of train and dev; the rest is test.

    Raises:
        ZooError: a file would be empty; nothing is written.
    """
    parts = _by_position(rows, fractions) if by == "position" else _by_record(rows, fractions)
    if not all(parts.values()):
        raise ZooError(f"{len(rows)} rows do not fill train, dev and test; give more records or split by position")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, found in parts.items():
        paths[name] = place / f"{name}.csv"
        with paths[name].open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["sequence", "label", "record", "start", "end", "strand"])
            writer.writerows([r.sequence, r.label, r.record, r.start, r.end, r.strand] for r in found)
    return paths


def _by_position(rows: Sequence[Row], fractions: tuple[float, float]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    cuts: dict[str, tuple[int, int]] = {}
    for record in {row.record for row in rows}:
        starts = sorted(row.start for row in rows if row.record == record)
        at = [min(round(f * len(starts)), len(starts) - 1) for f in (fractions[0], sum(fractions))]
        cuts[record] = starts[at[0]], starts[at[1]]
    for row in rows:
        first, second = cuts[row.record]
        name, end = (
            ("train", first) if row.start < first else ("dev", second) if row.start < second else ("test", row.end)
        )
        if row.start < row.end <= end:  # else (also over the origin of a circle) its bases would be in two files
            parts[name].append(row)
    return parts


def _by_record(rows: Sequence[Row], fractions: tuple[float, float]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.record, []).append(row)
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    wanted = dict(zip(parts, (*fractions, 1 - sum(fractions)), strict=True))
    for group in sorted(groups.values(), key=lambda g: (-len(g), g[0].record)):
        least = max(parts, key=lambda name: wanted[name] * len(rows) - len(parts[name]))
        parts[least].extend(group)
    return parts
