"""Alleles in their surroundings: where they lie, and the windows that a model reads them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.datamodules.augment import reverse_complement


@dataclass(frozen=True)
class Contig:
    """A sequence that variants lie on.

    Attributes:
        name, length: of the sequence.
        read: upper-case bases [start, end), clipped to the sequence.
    """

    name: str
    length: int
    read: Callable[[int, int], bytes]

    @classmethod
    def of(cls, name: str, text: bytes) -> Contig:
        """A sequence in memory."""
        upper = text.upper()
        return cls(name, len(upper), lambda start, end: upper[max(start, 0) : max(end, 0)])


@dataclass(frozen=True)
class Site:
    """Alleles at one place: *ref* begins at 0-based *start* of the contig."""

    contig: Contig
    start: int
    ref: bytes
    alts: tuple[bytes, ...]


@dataclass(frozen=True)
class Haplotype:
    """A window: its bases, and where the allele's *size* bases begin in it."""

    text: bytes
    at: int
    size: int

    def flipped(self) -> Haplotype:
        """The window on the other strand."""
        return Haplotype(reverse_complement(self.text), len(self.text) - self.at - self.size, self.size)


def cut(site: Site, alts: Sequence[bytes], length: int, step: int = 1, equal: bool = True) -> list[Haplotype]:
    """Windows of the reference allele and of *alts*, at most *length* bases, each a multiple of *step* long.

    The longest allele stands in the middle, or as near to it as the ends of the contig allow. With *equal* every window
    is as long as that of the longest allele (shorter alleles get more bases behind them, at the end of the contig more
    before them), so that sums over bases compare like with like; otherwise all have the same surroundings.
    """
    alleles = [site.ref, *alts]
    most = max(map(len, alleles))
    end = site.start + len(site.ref)
    before, after = site.start, site.contig.length - end
    left = min((length - most) // 2, before)
    right = min(length - most - left, after)
    left = min(length - most - right, before)
    found = []
    for allele in alleles:
        missing = most - len(allele) if equal else 0
        behind = min(right + missing, after)
        ahead = min(left + right + missing - behind, before)
        over = (ahead + len(allele) + behind) % step
        behind, ahead = (behind - over, ahead) if behind >= over else (behind, max(ahead - over, 0))
        text = site.contig.read(site.start - ahead, site.start) + allele + site.contig.read(end, end + behind)
        found.append(Haplotype(text, ahead, len(allele)))
    return found
