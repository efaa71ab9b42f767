"""Scores for the records of a VCF file, and how well they tell labelled variants apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from zoo.datamodules.fasta import Genome
from zoo.datamodules.vcf import Variant, check_variant, reason
from zoo.errors import ZooError
from zoo.train.haplotypes import Contig, Site
from zoo.train.variants import Effect, VariantScorer

LabelOf = Callable[[Variant, str], int | None]
CHUNK = 1024  # records scored together
POSITIVE = {"1", "true", "yes", "causal", "pathogenic", "likely_pathogenic", "pathogenic/likely_pathogenic"}
NEGATIVE = {"0", "false", "no", "neutral", "benign", "likely_benign", "benign/likely_benign"}


def contigs(genome: Genome) -> dict[str, Contig]:
    """The genome's sequences as variants read them: in upper case, since soft-masking is no allele."""

    def reader(name: str) -> Contig:
        return Contig(name, genome.records[name].length, lambda a, b: genome.read(name, a, b).tobytes().upper())

    return {name: reader(name) for name in genome.records}


def check_all(variants: Iterable[Variant], genome: Genome, labels: LabelOf | None = None) -> None:
    """Check every record against the genome, and that there are both kinds of labels, before anything is computed.

    Raises:
        ZooError: the first record that is not of this genome (named), or labels of one kind only.
    """
    counts = {1: 0, 0: 0, None: 0}
    for variant in variants:
        check_variant(variant, genome)
        for alt in variant.alts if labels is not None else ():
            if not reason(variant.ref, alt):
                counts[labels(variant, alt)] += 1  # type: ignore[misc]
    if labels is not None:
        _require_both(counts[1], counts[0])


def _require_both(positive: int, negative: int) -> None:
    if not positive or not negative:
        raise ZooError(
            f"AUROC needs both kinds of labels, but of the variants that get a score {positive} are pathogenic and "
            f"{negative} benign"
        )


def score_variants(
    scorer: VariantScorer, variants: Iterable[Variant], genome: Genome
) -> Iterator[tuple[Variant, list[Effect]]]:
    """(record, one Effect for each ALT allele), in order. Alleles that are no sequence get a note and no score.

    Raises:
        ZooError: a record that is not of this genome; names it.
    """
    known = contigs(genome)
    stream = iter(variants)
    while chunk := list(islice(stream, CHUNK)):
        sites, notes = [], []
        for variant in chunk:
            check_variant(variant, genome)
            why = [reason(variant.ref, alt) for alt in variant.alts]
            alts = tuple(alt.encode() for alt, note in zip(variant.alts, why, strict=True) if not note)
            sites.append(Site(known[variant.chrom], variant.start, variant.ref.encode(), alts))
            notes.append(why)
        for variant, why, found in zip(chunk, notes, scorer(sites), strict=True):
            effects = iter(found)
            yield variant, [Effect(None, note=note) if note else next(effects) for note in why]


def label_of(text: str | None, place: str) -> int | None:
    """1 for pathogenic, 0 for benign, None for what is neither (uncertain, conflicting, not given).

    ClinVar's words, in any case and with further terms behind `|` or `,`, or 1/0, true/false, yes/no.

    Raises:
        ZooError: a number other than 0 and 1, which is no class.
    """
    words = [word.strip().lower().replace(" ", "_") for word in (text or "").replace("|", ",").split(",")]
    found = {1 for word in words if word in POSITIVE} | {0 for word in words if word in NEGATIVE}
    if not found and any(word.replace(".", "", 1).removeprefix("-").isdecimal() for word in words if word != "."):
        raise ZooError(f"{place}: a label must be 0 or 1 or one of ClinVar's words, got '{text}'")
    return found.pop() if len(found) == 1 else None


@dataclass
class Labelled:
    """Scores of labelled variants, the larger the more unusual, as they come.

    Attributes:
        scores, labels: of the variants with a score and a label.
    """

    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, score: float | None, label: int | None) -> None:
        """Count a variant, if it has both."""
        if score is not None and label is not None:
            self.scores.append(score)
            self.labels.append(label)

    def summary(self) -> dict[str, float | int]:
        """`auroc`, `auprc`, `positive`, `negative` (numbers of variants).

        Raises:
            ZooError: only one kind of label.
        """
        labels = np.array(self.labels, np.int64)
        positive, negative = int(labels.sum()), int((1 - labels).sum())
        _require_both(positive, negative)
        scores = np.array(self.scores, np.float64)
        return {
            "auroc": auroc(scores, labels),
            "auprc": average_precision(scores, labels),
            "positive": positive,
            "negative": negative,
        }


def auroc(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney U)."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # mean rank of each run of ties, from 1
    positive = int(labels.sum())
    return float((ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def average_precision(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Area under the precision-recall curve as a step function: precision at each threshold, weighted by new recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # thresholds stand between different scores
    hits, seen = hits[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) * hits / seen).sum() / labels.sum())
