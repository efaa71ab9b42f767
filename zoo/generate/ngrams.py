"""n-grams of any length by a suffix array (infini-gram, arXiv:2401.17377), and drafts that copy from a text.

The array sorts all suffixes of a corpus, so the occurrences of a gram are one stretch of it, found by two binary
searches. Input-guided aggressive decoding (arXiv:2106.04970) copies the prompt where the output's tail is unique in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.generate.draft import Verdict
from zoo.generate.noise import Noise
from zoo.generate.verify import Draft


class NGramIndex:
    """Counts of grams in documents.

    Args:
        documents: token ids, not negative. A document's end counts as a successor of its own, `eos`.
        eos: the id of that successor.
    """

    def __init__(self, documents: Iterable[Sequence[int]], eos: int) -> None:
        self.eos = eos
        parts = [np.asarray([*document, -1], np.int64) for document in documents]
        self.text: NDArray[np.int64] = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        self.suffixes = _suffix_array(self.text)

    def find(self, gram: Sequence[int]) -> tuple[int, int]:
        """Stretch of the suffix array whose suffixes begin with *gram*."""
        low, high = 0, len(self.suffixes)
        for depth, token in enumerate(gram):
            low, high = self._narrow(low, high, depth, token)
            if low == high:
                break
        return low, high

    def _narrow(self, low: int, high: int, depth: int, token: int) -> tuple[int, int]:
        """The part of a stretch of suffixes alike in *depth* tokens that go on with *token*."""
        edges = []
        for above in (token, token + 1):
            a, b = low, high
            while a < b:
                middle = (a + b) // 2
                if self._token(middle, depth) < above:
                    a = middle + 1
                else:
                    b = middle
            edges.append(a)
        return edges[0], edges[1]

    def _token(self, place: int, depth: int) -> int:
        at = self.suffixes[place] + depth
        return int(self.text[at]) if at < len(self.text) else -1

    def count(self, gram: Sequence[int]) -> int:
        """Occurrences of *gram*."""
        low, high = self.find(gram)
        return high - low

    def longest(self, context: Sequence[int]) -> int:
        """Length of the longest end of *context* that occurs; whatever ends a gram that occurs occurs too."""
        low, high = 0, len(context)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(context[len(context) - middle :]) else (low, middle - 1)
        return low

    def successors(self, gram: Sequence[int]) -> dict[int, int]:
        """How often each token follows *gram*; `eos` for the ends of documents."""
        low, high = self.find(gram)
        places = self.suffixes[low:high] + len(gram)
        tokens, counts = np.unique(self.text[places[places < len(self.text)]], return_counts=True)
        return {self.eos if t < 0 else int(t): int(n) for t, n in zip(tokens, counts, strict=True)}

    def probability(self, context: Sequence[int], token: int, order: int | None = None) -> float:
        """count(context token) / count(context) for the last order - 1 tokens, or the longest end that occurs (None).

        -1 where the context of a given order does not occur.
        """
        size = self.longest(context) if order is None else min(order - 1, len(context))
        kept = list(context[len(context) - size :])
        total = self.count(kept)
        return self.successors(kept).get(token, 0) / total if total else -1.0


def _suffix_array(text: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of all suffixes in ascending order, by doubling the length that they are sorted by."""
    rank = np.unique(text, return_inverse=True)[1].astype(np.int64).reshape(-1) + 1
    order, size = np.argsort(rank, kind="stable"), 1
    while size < len(text) and rank.max() < len(text):
        behind = np.concatenate([rank[size:], np.zeros(min(size, len(rank)), np.int64)])
        key = rank * (len(text) + 1) + behind
        order = np.argsort(key, kind="stable")
        steps = np.concatenate([[1], (np.diff(key[order]) > 0).astype(np.int64)])
        rank = np.empty_like(rank)
        rank[order] = np.cumsum(steps)
        size *= 2
    return order


class IndexDraft:
    """A chain of the likeliest successors in an index, each after the longest end of the text that occurs.

    Args:
        index: counts of grams.
        least: occurrences of a context below which nothing is guessed from it.
        context: most tokens of a context.
    """

    def __init__(self, index: NGramIndex, least: int = 1, context: int = 16) -> None:
        self.index = index
        self.least = least
        self.context = context

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> IndexDraft:
        return self

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        tokens: list[int] = []
        known = list(context[-self.context :])
        while len(tokens) < budget:
            size = self.index.longest(known)
            after = self.index.successors(known[len(known) - size :]) if size else {}
            if sum(after.values()) < self.least or not after:
                break
            token = max(after, key=lambda t: (after[t], -t))
            if token == self.index.eos:
                break
            tokens.append(token)
            known = [*known, token][-self.context :]
        return Draft(tokens, list(range(-1, len(tokens) - 1)))

    def observe(self, verdict: Verdict) -> None:
        """An index learns nothing."""


class InputCopy:
    """Input-guided aggressive decoding: after the place where the output's tail stands, once, in the source.

    Args:
        max_gram: longest tail that is looked for; the shortest that is unique decides.
        source: text to copy from; None for each sequence's own prompt.
    """

    def __init__(self, max_gram: int = 3, source: Sequence[int] | None = None) -> None:
        self.max_gram = max_gram
        self.source = source

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> CopySession:
        own = self.source is None
        return CopySession(prompt if self.source is None else self.source, self.max_gram, len(prompt) if own else 0)


class CopySession:
    """Where each gram of a source ends; None where that is not one place."""

    def __init__(self, source: Sequence[int], max_gram: int, begun: int = 0) -> None:
        self.source, self.max_gram, self.begun = list(source), max_gram, begun
        self._ends: dict[tuple[int, ...], int | None] = {}
        for size in range(1, max_gram + 1):
            for start in range(len(self.source) - size + 1):
                gram = tuple(self.source[start : start + size])
                self._ends[gram] = None if gram in self._ends else start + size

    def anchor(self, tail: Sequence[int]) -> int:
        """Place after the one occurrence of the shortest end of *tail* that has only one; -1 where there is none."""
        for size in range(1, min(self.max_gram, len(tail)) + 1):
            gram = tuple(tail[len(tail) - size :])
            if gram not in self._ends:
                return -1
            place = self._ends[gram]
            if place is not None:
                return place
        return -1

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        place = self.anchor(context[self.begun :][-self.max_gram :]) if len(context) > self.begun else -1
        tokens = [] if place < 0 else self.source[place : place + budget]
        return Draft(tokens, list(range(-1, len(tokens) - 1)))

    def observe(self, verdict: Verdict) -> None:
        """A source does not change."""
