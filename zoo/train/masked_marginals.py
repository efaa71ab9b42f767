"""Masked marginals: how likely a masked language model finds alleles where they are hidden from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.nn.layout import Layout
from zoo.train.embed import Reader
from zoo.train.haplotypes import Haplotype
from zoo.train.predict import by_length

Ids = NDArray[np.int64]
Span = tuple[int, int]


def marginals(
    reader: Reader, rows: Sequence[Sequence[Haplotype]], step: int, flip: bool, size: int, budget: int
) -> list[list[tuple[float, float]]]:
    """(log P(REF), log P(ALT)) of each ALT window of each row, whose first window is that of REF.

    Masked at once are all tokens that touch as many bases as the longer allele has, and those that re-tokenising
    changed. For single bases and letter tokens that is the one position, whose input is the same for all alleles.

    Args:
        reader: the model.
        rows: windows with the same surroundings.
        step: bases of a k-mer, 1 for other tokenizers.
        flip: the windows are those of the other strand.
        size, budget: most windows, and most tokens with padding, at a time.
    """
    queries = _Queries(reader)
    pairs: list[list[tuple[int, int]]] = []
    for row in rows:
        encoded = [reader.tokenizer.encode(one.text, reader.add_special) for one in row]
        found = []
        for ids, alt in zip(encoded[1:], row[1:], strict=True):
            one, two = masked_spans(reader, encoded[0], row[0], ids, alt, step, flip)
            found.append((queries.add(encoded[0], one), queries.add(ids, two)))
        pairs.append(found)
    values = queries.answer(size, budget)
    return [[(values[one], values[two]) for one, two in row] for row in pairs]


def masked_spans(
    reader: Reader, ref: Ids, one: Haplotype, alt: Ids, two: Haplotype, step: int = 1, flip: bool = False
) -> tuple[Span, Span]:
    """Token ranges that are masked in the windows of REF (tokens *ref*) and ALT (*alt*)."""
    most = max(one.size, two.size)
    out = []
    for hap in (one, two):
        low = max(hap.at + hap.size - most, 0) if flip else hap.at
        high = hap.at + hap.size if flip else hap.at + most
        spans = reader.spans(hap.text)
        touched = np.flatnonzero((spans[:, 1] > low) & (spans[:, 0] < high))
        out.append((int(touched[0]), int(touched[-1]) + 1))
    if step > 1:
        return out[0], out[1]  # an indel shifts the frame of all k-mers behind it, which must not all be masked
    shortest = min(len(ref), len(alt))
    start = min(_common(ref[:shortest], alt[:shortest]), out[0][0], out[1][0])
    behind = _common(ref[::-1][:shortest], alt[::-1][:shortest])
    behind = min(behind, len(ref) - out[0][1], len(alt) - out[1][1])
    return (start, len(ref) - behind), (start, len(alt) - behind)


def _common(one: Ids, two: Ids) -> int:
    """Length of the common beginning of two equally long arrays."""
    same = one == two
    return len(one) if same.all() else int(same.argmin())


class _Queries:
    """Masked inputs, each once, and the tokens whose likelihood is asked at their masked positions."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.mask = reader.tokenizer.special.get("mask", 0)
        self.inputs: dict[tuple[bytes, int, int], int] = {}
        self.asked: list[tuple[int, Ids]] = []
        self.rows: list[tuple[Ids, int, int]] = []

    def add(self, ids: Ids, span: Span) -> int:
        """Ask for ids[span]; returns the number of the question."""
        low, high = span
        masked = ids.copy()
        masked[low:high] = self.mask
        key = (masked.tobytes(), low, high)
        if key not in self.inputs:
            self.inputs[key] = len(self.rows)
            self.rows.append((masked, low, high))
        self.asked.append((self.inputs[key], ids[low:high]))
        return len(self.asked) - 1

    @torch.inference_mode()
    def answer(self, size: int, budget: int) -> list[float]:
        """Summed log-likelihood of each question."""
        laws: list[Tensor | None] = [None] * len(self.rows)
        model = self.reader.model
        for batch in by_length([row for row, _, _ in self.rows], size, budget):
            ids, valid = self.reader.pad([self.rows[i][0] for i in batch], None)
            hidden, _ = model.forward_features(ids, Layout(model.layout_kind, valid=valid))
            first = valid.int().argmax(1).tolist()
            for row, (place, lead) in enumerate(zip(batch, first, strict=True)):
                _, low, high = self.rows[place]
                states = hidden[row, lead + low : lead + high]  # the head sees masked positions alone
                laws[place] = model.forward_head(states[None])[0].float().log_softmax(-1).cpu()
        out = []
        for place, target in self.asked:
            law = laws[place]
            assert law is not None
            out.append(float(law.double().gather(-1, torch.from_numpy(target)[:, None]).sum()))
        return out
