"""In-silico saturation mutagenesis: what each of the three other bases at each position does to a model's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ZooError, nearest
from zoo.train.embed import Reader
from zoo.train.evaluate import opened
from zoo.train.haplotypes import Contig, Haplotype, Site, cut
from zoo.train.predict import Predictor
from zoo.train.variants import METHODS, VariantScorer

LETTERS = b"ACGT"
LONGEST = 8192  # bases read around a position unless a window is asked for
CHUNK = 256  # positions scored together
LABELS = {
    "llr": "log-likelihood ratio",
    "masked_marginal": "log-odds against the reference",
    "distance": "1 - cosine",
    "logit": "change of log-odds",
    "value": "change",
}


@dataclass(frozen=True)
class Mutagenesis:
    """Changes at consecutive positions.

    Attributes:
        name: of the sequence.
        start: 0-based first position.
        reference: L letters.
        changes: `{measure: [L, 4]}` for A, C, G, T; 0 for the reference itself, NaN where it is none of them. The first
            measure is the one to draw.
        target: the class or output that changed; "" for language models.
    """

    name: str
    start: int
    reference: bytes
    changes: dict[str, NDArray[np.float64]]
    target: str = ""

    @property
    def measure(self) -> str:
        """The first measure."""
        return next(iter(self.changes))

    @property
    def is_law(self) -> bool:
        """The changes are log-ratios of the base's probabilities."""
        return self.measure in ("llr", "masked_marginal")


class Mutagen:
    """Mutates sequences for one model.

    Args:
        ref: folder, catalogue name, Hub id, or a loaded artifact.
        target: class (or output) whose change is measured; None takes the one predicted for the sequence. Language
            models have none: they give the log-likelihood ratio, or the masked marginal.
        window: bases read around a position; None reads the whole sequence as far as the model takes it.
        strand: `+`, `-` or `both` (the mean).
        batch_size: most windows at a time.

    Raises:
        ZooError: a model without one output for the sequence, or without that class.
    """

    def __init__(
        self,
        ref: Any,
        target: str | None = None,
        window: int | None = None,
        strand: str = "+",
        *,
        batch_size: int = 64,
        device: Any = None,
    ) -> None:
        artifact = opened(ref)
        self.window, self.strand, self.size = window, strand, batch_size
        self.reader = Reader(artifact, device)
        self.predictor: Predictor | None = None
        if self.reader.lm:
            if target is not None:
                raise ZooError(f"{artifact.path} is a language model and has no classes, so '{target}' means nothing")
            self.target = None
            return
        self.predictor = Predictor(artifact, device)
        if self.predictor.head.kind != "sequence":
            raise ZooError(
                f"{artifact.path} has a '{self.predictor.head.kind}' head, which gives no output for a sequence: "
                "take a language model or a classifier of sequences"
            )
        names = self.predictor.classes
        if target is not None and target not in names:
            raise ZooError(f"{artifact.path} has no class '{target}'" + nearest(target, names))
        self.target = None if target is None else names.index(target)

    def __call__(self, name: str, text: bytes, start: int = 0, end: int | None = None) -> Mutagenesis:
        """All substitutions at positions [start, end) of a sequence, which is read in upper case.

        Raises:
            ZooError: the window is longer than the model takes.
        """
        contig = Contig.of(name, text)
        end = contig.length if end is None else end
        reference = contig.read(start, end)
        sites = [
            Site(contig, start + i, reference[i : i + 1], tuple(bytes([b]) for b in LETTERS if b != letter))
            for i, letter in enumerate(reference)
            if letter in LETTERS
        ]
        scorer = VariantScorer(self.reader, None, self._window(contig.length), self.strand, batch_size=self.size)
        if self.predictor is None:
            table = self._table(reference, sites, start, self._in_chunks(scorer, sites))
            return Mutagenesis(name, start, reference, {scorer.method: table})
        return self._classified(name, start, reference, sites, scorer)

    def _window(self, length: int) -> int:
        tokenizer, step = self.reader.tokenizer, int(getattr(self.reader.tokenizer, "k", 1))
        frame = (len(tokenizer.prefix) + len(tokenizer.suffix)) * self.reader.add_special
        read = None if self.predictor is None else self.predictor.max_len  # what lies behind, a classifier cuts off
        if self.window is not None:
            if read is not None and self.window > (read - frame) * step:
                raise ZooError(
                    f"a window of {self.window} bases is longer than {self.reader.path} was trained on: at most "
                    f"{(read - frame) * step} (data.max_len)"
                )
            return self.window
        limits = [most for most in (self.reader.limit, read) if most is not None]
        most = (min(limits) - frame) * step if limits else LONGEST
        return max(min(length, most, LONGEST), 2 * step)

    def _in_chunks(self, scorer: VariantScorer, sites: Sequence[Site]) -> list[list[float]]:
        out = []
        for i in range(0, len(sites), CHUNK):
            rows = scorer(sites[i : i + CHUNK])
            out += [[np.nan if effect.score is None else effect.score for effect in row] for row in rows]
        return out

    @staticmethod
    def _table(
        reference: bytes, sites: Sequence[Site], start: int, rows: Sequence[Sequence[float]]
    ) -> NDArray[np.float64]:
        """[L, 4] from three changes a site."""
        table = np.full((len(reference), 4), np.nan)
        for site, row in zip(sites, rows, strict=True):
            others = [i for i, letter in enumerate(LETTERS) if letter != site.ref[0]]
            table[site.start - start] = 0
            table[site.start - start, others] = row
        return table

    def _classified(
        self, name: str, start: int, reference: bytes, sites: Sequence[Site], scorer: VariantScorer
    ) -> Mutagenesis:
        assert self.predictor is not None
        kind = self.predictor.kind
        scores = [
            self._outputs(name, sites, scorer, flip) for flip in scorer.strands
        ]  # [N, 4, outputs] each, reference first
        odds = torch.stack(scores).mean(0)
        target = self.target
        if target is None:
            target = int(odds[:, 0].mean(0).argmax()) if len(sites) else 0
        chosen = odds[..., target].numpy()  # [N, 4]
        names = self.predictor.classes
        measure = {"value" if kind == "regression" else "logit": chosen}
        if kind != "regression":
            measure["probability"] = 1 / (1 + np.exp(-chosen))
        changes = {
            key: self._table(reference, sites, start, (values[:, 1:] - values[:, :1]).tolist())
            for key, values in measure.items()
        }
        return Mutagenesis(name, start, reference, changes, names[target])

    def _outputs(self, name: str, sites: Sequence[Site], scorer: VariantScorer, flip: bool) -> Tensor:
        """[N, 4, outputs] log-odds of each class (values of a regression) of the reference and the three others."""
        assert self.predictor is not None
        rows: list[list[Haplotype]] = [cut(site, site.alts, scorer.window, scorer.step) for site in sites]
        texts = [(one.flipped() if flip else one).text for row in rows for one in row]
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct = list(places)
        found = torch.zeros(len(distinct), self.predictor.head.num_outputs, dtype=torch.float64)
        for batch in self.reader.batches([name] * len(distinct), distinct, self.size, scorer.tokens):
            logits = self.predictor.logits([distinct[i] for i in batch])[0]
            found[batch] = logits.double().cpu()
        if self.predictor.kind not in ("regression", "multilabel"):
            found = log_odds(found)
        return found[[places[text] for text in texts]].reshape(len(sites), 4, -1)


def log_odds(logits: Tensor) -> Tensor:
    """log p / (1 - p) of each of the classes of logits [..., C] (C of at least 2)."""
    total = torch.arange(logits.shape[-1])
    rest = [torch.logsumexp(logits[..., total != i], -1) for i in range(logits.shape[-1])]
    return logits - torch.stack(rest, -1)


def meaning(measure: str) -> str:
    """What a measure is, in words."""
    return LABELS.get(measure) or METHODS[measure]
