"""What a model makes of DNA variants: each allele in its window, scored by likelihood, masked marginal or distance.

A window holds an allele and what stands around it in the genome. All methods read `+` strand windows, their reverse
complements, or both (the mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.datamodules.augment import reverse_complement
from zoo.errors import ZooError
from zoo.nn.heads import pool
from zoo.nn.layout import Layout
from zoo.train.assemble import bases_of
from zoo.train.embed import Reader

Method = Literal["llr", "masked_marginal", "distance", "upstream"]
METHODS: dict[str, str] = {
    "llr": "log P(window with ALT) - log P(window with REF), natural logarithm; below 0: ALT is less likely",
    "masked_marginal": "log P(ALT) - log P(REF) of the masked alleles given the rest; below 0: ALT is less likely",
    "distance": "1 - cosine of the mean hidden states with REF and with ALT; 0: no difference",
    "upstream": "log(p_ref / (p_alt + 1e-10)) of the next base after the bases before it; above 0: ALT is less likely",
}
# sign that turns a score into "the larger, the more unusual the variant"
DIRECTION = {"llr": -1.0, "masked_marginal": -1.0, "distance": 1.0, "upstream": 1.0}
DEFAULT_WINDOW, LONGEST_DEFAULT = 1024, 8192  # bases; GENERator's published scores read 8,192
LOGITS = 2**26  # elements of one batch's logits; bounds memory for large vocabularies


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
class Effect:
    """Score of one ALT allele.

    Attributes:
        score: None where *note* says why there is none.
        ref, alt: the two numbers it was made of (log-likelihoods, log-probabilities); None for distances.
        note: `too_long` (longer than half the window), `not_single_base` or `no_context` (method `upstream`).
    """

    score: float | None
    ref: float | None = None
    alt: float | None = None
    note: str = ""


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


class VariantScorer:
    """Scores sites with one method.

    Args:
        ref: folder, catalogue name, Hub id, a loaded artifact, or a Reader.
        method: `llr` (sum over the window's tokens; for masked models by pseudo-likelihood, one pass a token),
            `masked_marginal`, `distance`, or `upstream` (GENERator's published variant score: single bases, context
            before them alone). None: `llr` for causal language models, `masked_marginal` for masked ones, `distance`
            for models that give no likelihoods.
        window: bases; None takes what the model was trained on, else its longest input up to 8,192 bases, else 1,024.
        strand: `+`, `-` or `both`.
        batch_size, batch_tokens: most windows, and most tokens with padding, at a time; None: what suits the device.

    Raises:
        ZooError: the model cannot be scored that way, or takes no such window.
    """

    def __init__(
        self,
        ref: Any,
        method: str | None = None,
        window: int | None = None,
        strand: str = "+",
        *,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        device: Any = None,
    ) -> None:
        self.reader = ref if isinstance(ref, Reader) else Reader(ref, device)
        self.step = int(getattr(self.reader.tokenizer, "k", 1))
        self.method = method or self._default()
        self.strands = {"+": (False,), "-": (True,), "both": (False, True)}[strand]
        self.size = batch_size
        rows = int(self.reader.model.embed.weight.shape[0])
        self.tokens = batch_tokens or self.reader.batch_tokens
        if self.method == "llr":
            self.tokens = min(self.tokens, max(LOGITS // rows, 1))
        self._check()
        self.window = self._window(window)

    def _default(self) -> str:
        if not self.reader.lm:
            return "distance"
        return "llr" if self.reader.causal else "masked_marginal"

    def _check(self) -> None:
        reader = self.reader
        if self.method not in METHODS:
            raise ZooError(f"unknown score '{self.method}' (known: {', '.join(METHODS)})")
        if self.method != "distance" and not reader.lm:
            raise ZooError(
                f"{reader.path} has a '{reader.model.config.head.kind}' head and gives no likelihoods: "
                "score it by distance"
            )
        if self.method == "masked_marginal" and reader.causal:
            raise ZooError(f"{reader.path} reads from left to right, so its alleles cannot be masked: score it by llr")
        if self.method == "upstream" and not reader.causal:
            raise ZooError(f"{reader.path} does not predict the next base: score it by masked_marginal")
        if self.method == "masked_marginal" and "mask" not in reader.tokenizer.special:
            raise ZooError(f"the {reader.tokenizer.name} tokenizer of {reader.path} has no mask token")

    def _window(self, wanted: int | None) -> int:
        frame = len(self.reader.tokenizer.prefix) + len(self.reader.tokenizer.suffix)
        limit = self.reader.limit
        most = None if limit is None else (limit - frame * self.reader.add_special) * self.step
        if wanted is None:
            trained = self.reader.trained_length
            wanted = trained or min(LONGEST_DEFAULT, DEFAULT_WINDOW if most is None else most)
            wanted = wanted if most is None else min(wanted, most)
        elif most is not None and wanted > most:
            raise ZooError(f"a window of {wanted} bases is longer than {self.reader.path} takes: at most {most}")
        if wanted < 2 * self.step:
            raise ZooError(f"a window must hold at least {2 * self.step} bases, got {wanted}")
        return wanted // self.step * self.step

    def __call__(self, sites: Sequence[Site]) -> list[list[Effect]]:
        """One Effect for each alternative allele of each site."""
        score = {
            "llr": self._likelihoods,
            "masked_marginal": self._marginals,
            "distance": self._distances,
            "upstream": self._upstream,
        }[self.method]
        # alleles that leave the model little to see them in are not scored; the others of their site are
        fits = [[max(len(alt), len(site.ref)) <= self.window // 2 for alt in site.alts] for site in sites]
        kept = [
            Site(site.contig, site.start, site.ref, tuple(alt for alt, fit in zip(site.alts, row, strict=True) if fit))
            for site, row in zip(sites, fits, strict=True)
        ]
        strands = [score(kept, flip) for flip in self.strands]
        out = []
        for i, row in enumerate(fits):
            effects = iter([_mean([strand[i][j] for strand in strands]) for j in range(sum(row))])
            out.append([next(effects) if fit else Effect(None, note="too_long") for fit in row])
        return out

    def _windows(self, sites: Sequence[Site], flip: bool, equal: bool) -> list[list[Haplotype]]:
        found = [cut(site, site.alts, self.window, self.step, equal) if site.alts else [] for site in sites]
        return [[one.flipped() if flip else one for one in row] for row in found]

    def _likelihoods(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        rows = self._windows(sites, flip, equal=True)
        texts = list({one.text for row in rows for one in row})
        totals: dict[bytes, float] = {}
        for batch in self.reader.batches(texts, texts, self.size, self.tokens):
            ids, valid = self.reader.encode([texts[i] for i in batch])
            values = self.reader.likelihoods(ids, valid).double()
            counted = self._bases[ids] > 0
            sums = (values * counted).sum(1).tolist()
            totals |= {texts[place]: total for place, total in zip(batch, sums, strict=True)}
        return [[_ratio(totals[row[0].text], totals[one.text]) for one in row[1:]] for row in rows]

    @cached_property
    def _bases(self) -> Tensor:
        return torch.tensor(bases_of(self.reader.tokenizer), device=self.reader.device)

    def _marginals(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        """Masked at once: all tokens that touch as many bases as the longer allele has, and that re-tokenising changed.

        For single bases and letter tokens that is the one position, whose input is the same for all alleles.
        """
        queries = _Queries(self.reader)
        pairs: list[list[tuple[int, int]]] = []
        for row in self._windows(sites, flip, equal=False):
            encoded = [(self.reader.tokenizer.encode(one.text, self.reader.add_special), one) for one in row]
            found = []
            for ids, alt in encoded[1:]:
                most = max(alt.size, row[0].size)
                spans = self._spans(encoded[0][0], row[0], ids, alt, most, flip)
                found.append((queries.add(encoded[0][0], spans[0]), queries.add(ids, spans[1])))
            pairs.append(found)
        values = queries.answer(self.size, self.tokens)
        return [[_ratio(values[a], values[b]) for a, b in row] for row in pairs]

    def _spans(
        self, ref: NDArray[np.int64], one: Haplotype, alt: NDArray[np.int64], two: Haplotype, most: int, flip: bool
    ) -> list[tuple[int, int]]:
        """Token ranges of both windows that are masked."""
        out = []
        for hap in (one, two):
            low = max(hap.at + hap.size - most, 0) if flip else hap.at
            high = hap.at + hap.size if flip else hap.at + most
            spans = self.reader.spans(hap.text)
            touched = np.flatnonzero((spans[:, 1] > low) & (spans[:, 0] < high))
            out.append((int(touched[0]), int(touched[-1]) + 1))
        if self.step > 1:
            return out  # an indel shifts the frame of all k-mers behind it, which must not all be masked
        shortest = min(len(ref), len(alt))
        same = ref[:shortest] == alt[:shortest]
        first = shortest if same.all() else int(same.argmin())
        same = ref[::-1][:shortest] == alt[::-1][:shortest]
        last = shortest if same.all() else int(same.argmin())
        start = min(first, out[0][0], out[1][0])
        behind = min(last, len(ref) - out[0][1], len(alt) - out[1][1])
        return [(start, max(len(ids) - behind, start)) for ids in (ref, alt)]

    def _distances(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        rows = self._windows(sites, flip, equal=False)
        texts = list({one.text for row in rows for one in row})
        vectors: dict[bytes, NDArray[np.float64]] = {}
        for batch in self.reader.batches(texts, texts, self.size, self.tokens):
            ids, valid = self.reader.encode([texts[i] for i in batch])
            means = pool(self.reader.hidden(ids, valid).double(), valid, "mean").cpu().numpy()  # [B, D]
            vectors |= {texts[place]: mean for place, mean in zip(batch, means, strict=True)}
        return [[Effect(_cosine(vectors[row[0].text], vectors[one.text])) for one in row[1:]] for row in rows]

    @torch.inference_mode()
    def _upstream(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        """GENERator's published score: leading N dropped, the rest cut on its left to whole k-mers, no end token."""
        texts = [self._context(site, flip) for site in sites]
        tokenizer = self.reader.tokenizer
        rows = [
            np.concatenate([np.array(tokenizer.prefix, np.int64), tokenizer.encode(text, add_special=False)])
            for text in texts
        ]
        known = [i for i, row in enumerate(rows) if len(row)]
        first = _first_bases(tokenizer, int(self.reader.model.embed.weight.shape[0])).to(self.reader.device)
        law = {}
        for batch in _by_length([rows[i] for i in known], self.size, self.tokens):
            ids, valid = self.reader.pad([rows[known[i]] for i in batch], "left")
            hidden, _ = self.reader.model.forward_features(ids, Layout(self.reader.model.layout_kind, valid=valid))
            p = self.reader.model.forward_head(hidden[:, -1:])[:, 0].float().softmax(-1) @ first  # [B, 4]
            law |= {known[i]: dict(zip(b"ACGT", row, strict=True)) for i, row in zip(batch, p.tolist(), strict=True)}
        out = []
        for i, site in enumerate(sites):
            effects = []
            for alt in site.alts:
                if len(site.ref) != 1 or len(alt) != 1:
                    effects.append(Effect(None, note="not_single_base"))
                elif i not in law or (site.ref[0] not in b"ACGT"):
                    effects.append(Effect(None, note="no_context"))
                else:
                    one, two = (reverse_complement(a)[0] if flip else a[0] for a in (site.ref, alt))
                    p_ref, p_alt = law[i][one], law[i][two]
                    effects.append(Effect(math.log(max(p_ref, 1e-300) / (p_alt + 1e-10)), _log(p_ref), _log(p_alt)))
            out.append(effects)
        return out

    def _context(self, site: Site, flip: bool) -> bytes:
        if flip:
            end = site.start + len(site.ref)
            text = reverse_complement(site.contig.read(end, end + self.window))
        else:
            text = site.contig.read(site.start - self.window, site.start)
        text = text.lstrip(b"N")
        return text[len(text) % self.step :]


class _Queries:
    """Masked inputs, each once, and the tokens whose likelihood is asked at their masked positions."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.mask = reader.tokenizer.special.get("mask", 0)
        self.inputs: dict[tuple[bytes, int, int], int] = {}
        self.asked: list[tuple[int, NDArray[np.int64]]] = []
        self.rows: list[tuple[NDArray[np.int64], int, int]] = []

    def add(self, ids: NDArray[np.int64], span: tuple[int, int]) -> int:
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
        for batch in _by_length([row for row, _, _ in self.rows], size, budget):
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


def _by_length(rows: Sequence[NDArray[np.int64]], size: int, budget: int) -> Iterator[list[int]]:
    from zoo.train.predict import _batches

    yield from _batches(np.array([len(row) for row in rows]), size, budget)


def _first_bases(tokenizer: Any, rows: int) -> Tensor:
    """[V, 4] 1 where a token's bases begin with A, C, G, T; nothing for special tokens and rows without a token."""
    table = torch.zeros(rows, 4)
    for token in range(min(tokenizer.vocab_size, rows)):
        text = tokenizer.sequence([token])[:1].upper()
        if text and text in "ACGT":
            table[token, "ACGT".index(text)] = 1
    return table


def _log(p: float) -> float:
    return math.log(max(p, 1e-300))


def _ratio(ref: float, alt: float) -> Effect:
    return Effect(alt - ref, ref, alt)


def _cosine(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """1 - cos, from the difference of the unit vectors: nearly equal vectors lose no digits."""
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    if not all(lengths):
        return 0.0
    gap = one / lengths[0] - two / lengths[1]
    return float(gap @ gap / 2)


def _mean(effects: Sequence[Effect]) -> Effect:
    """The mean over strands; without score when one has none."""
    if len(effects) == 1 or any(effect.score is None for effect in effects):
        return next((effect for effect in effects if effect.score is None), effects[0])

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Effect(mean([e.score for e in effects]), mean([e.ref for e in effects]), mean([e.alt for e in effects]))
