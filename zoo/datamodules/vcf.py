"""VCF: reading variants as a stream, checking them against their genome, writing them back with further INFO fields.

The format is VCF 4.x (samtools.github.io/hts-specs). Lines are kept as they came: what is not written by us is never
re-formatted.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from zoo.datamodules.fasta import Genome
from zoo.datamodules.manifest import opened
from zoo.errors import ZooError, nearest

COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
INFO = COLUMNS.index("INFO")
_BASES = re.compile(r"[ACGT]+")
_REFERENCE = re.compile(r"[ACGTRYSWKMBDHVN]+")
_CONCRETE = frozenset(b"ACGT")


@dataclass(frozen=True)
class Variant:
    """A data line.

    Attributes:
        fields: its columns as they stand in the file.
        chrom, start: sequence and 0-based place of the first base of `ref`.
        ref, alts: the alleles in upper case, as they stand otherwise.
        place: `'file' line 12`, for messages.
    """

    fields: tuple[str, ...]
    chrom: str
    start: int
    ref: str
    alts: tuple[str, ...]
    place: str

    @property
    def name(self) -> str:
        """`chr1:12345 A>G`, as messages name it; positions count from 1."""
        return f"{self.chrom}:{self.start + 1} {self.ref}>{','.join(self.alts) or '.'}"

    def info(self, key: str) -> str | None:
        """The value of an INFO field: "" for a flag, None where it is not set."""
        for item in self.fields[INFO].split(";"):
            name, _, value = item.partition("=")
            if name == key:
                return value
        return None


def reason(ref: str, alt: str) -> str:
    """Why the bases of an allele are not known, "" where they are: A, C, G, T alone are sequence.

    `symbolic` for `<DEL>` and the like, `spanning` for `*` (deleted by another variant), `breakend`, `missing` for `.`,
    `ambiguous` where either allele has N or other letters.
    """
    if alt.startswith("<"):
        return "symbolic"
    if alt == "*":
        return "spanning"
    if alt == ".":
        return "missing"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return "breakend"
    return "" if _BASES.fullmatch(alt) and _BASES.fullmatch(ref) else "ambiguous"


class VcfFile:
    """A VCF file, plain or gzip-compressed: the header at once, records as they are asked for.

    Attributes:
        meta: the `##` lines.
        columns: the `#CHROM` line.

    Raises:
        ZooError: missing, empty, broken gzip, or without the `#CHROM` line.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ZooError(f"VCF file '{path}' does not exist")
        self.path = path
        self.meta: list[str] = []
        self.columns = ""
        for number, line in self._lines():
            if line.startswith("##"):
                self.meta.append(line)
                continue
            if tuple(line.split("\t")[: len(COLUMNS)]) != COLUMNS:
                raise ZooError(
                    f"'{path}' line {number} is not VCF: expected the columns #CHROM to INFO, tab-separated, "
                    f"got '{line[:40]}'"
                )
            self.columns = line
            return
        raise ZooError(f"VCF file '{path}' " + ("has no line of columns (#CHROM ...)" if self.meta else "is empty"))

    def _lines(self) -> Iterator[tuple[int, str]]:
        with opened(self.path) as raw:
            # whatever encoding the annotations have, they go out as they came in
            text = io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="\n")
            for number, line in enumerate(text, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line

    def __iter__(self) -> Iterator[Variant]:
        width = len(self.columns.split("\t"))
        for number, line in self._lines():
            if line.startswith("#"):
                continue
            fields, place = tuple(line.split("\t")), f"'{self.path}' line {number}"
            if len(fields) != width:
                raise ZooError(f"{place} has {len(fields)} columns, the header has {width}")
            chrom, position, _, ref, alt = fields[:5]
            if not position.isdecimal():
                raise ZooError(f"{place}: POS must be a whole number, got '{position[:20]}'")
            if not _REFERENCE.fullmatch(ref.upper()):
                raise ZooError(f"{place}: REF must be letters of DNA, got '{ref[:20]}'")
            alts = tuple(one.upper() for one in alt.split(",")) if alt != "." else ()
            yield Variant(fields, chrom, int(position) - 1, ref.upper(), alts, place)


def check_variant(variant: Variant, genome: Genome) -> None:
    """Raise ZooError when *variant* cannot be of *genome*: unknown sequence, beyond its end, or other bases than REF.

    Letters of the genome other than A, C, G, T agree with any REF.
    """
    if variant.chrom not in genome.records:
        raise ZooError(
            f"{variant.place}: the FASTA files have no sequence '{variant.chrom}'" + _alike(variant.chrom, genome)
        )
    length = genome.records[variant.chrom].length
    end = variant.start + len(variant.ref)
    if variant.start < 0 or end > length:
        if all(reason(variant.ref, alt) for alt in variant.alts):
            return  # telomeres, positions 0 and N + 1, have symbolic alleles and are not scored
        raise ZooError(
            f"{variant.place}: {variant.name} reaches beyond the end of '{variant.chrom}', which has {length} bases"
        )
    found = genome.read(variant.chrom, variant.start, end).tobytes().upper()
    wanted = variant.ref.encode()
    if found != wanted and any(a != b and a in _CONCRETE for a, b in zip(found, wanted, strict=True)):
        raise ZooError(
            f"{variant.place}: the reference allele of {variant.chrom}:{variant.start + 1} is '{variant.ref[:50]}' but "
            f"the FASTA file has '{found.decode('latin-1')[:50]}' there: is it another assembly?"
        )


def _alike(chrom: str, genome: Genome) -> str:
    """The hint for an unknown name; UCSC's and Ensembl's names differ by `chr`, MT by more."""
    bare = chrom.removeprefix("chr")
    for other in ("chr" + chrom, bare, {"MT": "chrM", "M": "MT"}.get(bare, "")):
        if other in genome.records:
            return f" (did you mean '{other}'?)"
    return nearest(chrom, genome.records)


@dataclass(frozen=True)
class InfoField:
    """An INFO field that is added: its declaration without the `##INFO=` around it."""

    id: str
    number: str
    type: str
    description: str

    @property
    def line(self) -> str:
        return f'##INFO=<ID={self.id},Number={self.number},Type={self.type},Description="{self.description}">'


def header(file: VcfFile, fields: Sequence[InfoField], notes: Sequence[str] = ()) -> list[str]:
    """The header lines with *fields* declared (in place of former declarations) and `##` *notes* added."""
    ids = tuple(f"##INFO=<ID={field.id}," for field in fields)
    keys = tuple(note.split("=", 1)[0] + "=" for note in notes)
    kept = [line for line in file.meta if not line.startswith(ids) and not line.startswith(keys)]
    return [*kept, *(field.line for field in fields), *notes, file.columns]


def with_info(variant: Variant, values: dict[str, str]) -> str:
    """The data line with INFO *values* set, those of the same name replaced; an empty value is left out."""
    old = [item for item in variant.fields[INFO].split(";") if item not in ("", ".")]
    kept = [item for item in old if item.partition("=")[0] not in values]
    added = [f"{key}={value}" for key, value in values.items() if value]
    info = ";".join(kept + added) or "."
    return "\t".join([*variant.fields[:INFO], info, *variant.fields[INFO + 1 :]])


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name only when it is complete; BGZF (which `tabix` reads) for names in .gz.

    Raises:
        ZooError: the file cannot be written.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise ZooError(f"cannot write '{path}': {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as raw:
            if path.name.endswith(".gz"):
                from Bio import bgzf

                packed = bgzf.BgzfWriter(fileobj=raw)
                text = _Encoded(packed)
                yield text  # type: ignore[misc]
                packed.close()  # the last block and the end mark
            else:
                stream = io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="")
                yield stream
                stream.flush()
                stream.detach()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise ZooError(f"cannot write '{path}': {error.strerror}") from None
        raise


class _Encoded:
    """`write(str)` on a binary stream: BgzfWriter's own text mode knows latin-1 alone."""

    def __init__(self, stream: object) -> None:
        self._write = stream.write  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        self._write(text.encode("utf-8", "surrogateescape"))
        return len(text)
