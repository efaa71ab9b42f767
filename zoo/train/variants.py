"""What a model makes of DNA variants: each allele in its window, scored by likelihood, masked marginal or distance.

A window holds an allele and what stands around it in the genome. All methods read `+` strand windows, their reverse
complements, or both (the mean).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from zoo.train.haplotypes import Haplotype, Site, cut
from zoo.train.masked_marginals import marginals
from zoo.train.predict import by_length

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
class Effect:
    """Score of one ALT allele.

    Attributes:
        score: None where *note* says why there is none.
        ref, alt: the two numbers it was made of (log-likelihoods, log-probabilities); None for distances.
        note: `too_long` (longer than half the window), `near_unknown` (N within the alleles' k-mers, which are then
            one unknown token whatever the allele), `unknown_in_window` (where such are to be skipped),
            `not_single_base` or `no_context` (method `upstream`).
    """

    score: float | None
    ref: float | None = None
    alt: float | None = None
    note: str = ""


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
        unknown: alleles whose windows hold N or other letters than A, C, G and T: `score` them all the same (such
            letters are no evidence, but the model reads them), or `skip` them.
        batch_size, batch_tokens: most windows, and most tokens with padding, at a time; None: what suits the device.

    Attributes:
        beside_unknown: alleles so far that were scored in a window with such letters.

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
        unknown: Literal["score", "skip"] = "score",
        batch_size: int = 64,
        batch_tokens: int | None = None,
        device: Any = None,
    ) -> None:
        self.reader = ref if isinstance(ref, Reader) else Reader(ref, device)
        self.step = int(getattr(self.reader.tokenizer, "k", 1))
        self.method = method or self._default()
        self.strands = {"+": (False,), "-": (True,), "both": (False, True)}[strand]
        self.size, self.unknown, self.beside_unknown = batch_size, unknown, 0
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
        notes = [self._notes(site) for site in sites]
        kept = [
            Site(
                site.contig, site.start, site.ref, tuple(a for a, note in zip(site.alts, row, strict=True) if not note)
            )
            for site, row in zip(sites, notes, strict=True)
        ]
        strands = [score(kept, flip) for flip in self.strands]
        out = []
        for i, row in enumerate(notes):
            effects = iter([_mean([strand[i][j] for strand in strands]) for j in range(row.count(""))])
            out.append([Effect(None, note=note) if note else next(effects) for note in row])
        return out

    def _notes(self, site: Site) -> list[str]:
        """Why an allele of a site is not scored, "" where it is."""
        if self.step > 1 and self.method not in ("distance", "upstream"):
            reach = self.step - 1
            around = site.contig.read(site.start - reach, site.start + len(site.ref) + reach)
            if set(around) - set(b"ACGT"):
                return ["near_unknown"] * len(site.alts)
        most = self.window // 2  # longer ones leave the model little to see them in
        notes = ["too_long" if max(len(alt), len(site.ref)) > most else "" for alt in site.alts]
        if "" in notes and self._beside(site):
            if self.unknown == "skip":
                return [note or "unknown_in_window" for note in notes]
            self.beside_unknown += notes.count("")
        return notes

    def _beside(self, site: Site) -> bool:
        """Whether the window of a site's reference allele holds letters that are no base."""
        if self.method == "upstream":
            texts = [self._context(site, flip) for flip in self.strands]
        else:
            texts = [cut(site, (), self.window, self.step)[0].text]
        return any(text.translate(None, b"ACGT") for text in texts)

    def _windows(self, sites: Sequence[Site], flip: bool, equal: bool) -> list[list[Haplotype]]:
        found = [cut(site, site.alts, self.window, self.step, equal) if site.alts else [] for site in sites]
        return [[one.flipped() if flip else one for one in row] for row in found]

    def _likelihoods(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        rows = self._windows(sites, flip, equal=True)
        texts = list({one.text for row in rows for one in row})
        totals: dict[bytes, float] = {}
        for batch in self.reader.batches([""] * len(texts), texts, self.size, self.tokens):
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
        rows = self._windows(sites, flip, equal=False)
        found = marginals(self.reader, rows, self.step, flip, self.size, self.tokens)
        return [[_ratio(ref, alt) for ref, alt in row] for row in found]

    def _distances(self, sites: Sequence[Site], flip: bool) -> list[list[Effect]]:
        rows = self._windows(sites, flip, equal=False)
        texts = list({one.text for row in rows for one in row})
        vectors: dict[bytes, NDArray[np.float64]] = {}
        for batch in self.reader.batches([""] * len(texts), texts, self.size, self.tokens):
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
        law: dict[int, dict[int, float]] = {}
        for batch in by_length([rows[i] for i in known], self.size, self.tokens):
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
