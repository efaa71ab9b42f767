"""Masked language modelling: recover tokens that were hidden, from both sides."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.tasks.base import Batch, Task, forward
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class MaskedLMConfig:
    """BERT's objective (Devlin et al. 2019, §3.1).

    Attributes:
        optim: optimiser and schedule.
        probability: share of the real tokens to predict.
        masked, random: of those, the shares replaced by the mask token and by a random token; the rest stay.
        whole_kmer: tokens are hidden in runs of this many neighbours, which share their fate, instead of one by one.
            Single bases, and k-mers that overlap, are nearly told by their neighbours (DNABERT, Ji et al. 2021, hides
            k at a time); where tokens are whole k-mers already, 1 hides whole k-mers.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    whole_kmer: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must lie between 0 and 1, got {self.probability}")
        if self.masked < 0 or self.random < 0 or self.masked + self.random > 1:
            raise ValueError(f"masked and random must be shares of at most 1 in all, got {self.masked}, {self.random}")
        if self.whole_kmer < 1:
            raise ValueError(f"whole_kmer must be at least 1 token, got {self.whole_kmer}")


class MaskedLM(Task):
    """Cross entropy of hidden tokens, perplexity, accuracy and bits per base. Batches hold ids and valid [B, L].

    Which tokens are hidden is drawn anew in training; an evaluation hides the same ones every time.
    """

    extra: Any
    bases: Tensor | None
    maskable: Tensor | None

    def __init__(self, model: nn.Module, config: MaskedLMConfig) -> None:
        super().__init__(model, config)
        names = ("accuracy", "base_nats")
        self.extra = nn.ModuleDict({s: nn.ModuleDict({n: WeightedMean() for n in names}) for s in ("val", "test")})
        self.register_buffer("bases", None, persistent=False)
        self.register_buffer("maskable", None, persistent=False)
        self.mask_id: int | None = None

    def set_bases(self, bases: list[int]) -> None:
        """How many real bases each token id stands for; see `CausalLM.set_bases`."""
        self.bases = torch.tensor(bases, dtype=torch.long, device=self.device)

    def set_vocabulary(self, size: int, special: dict[str, int], hidden: frozenset[int] = frozenset()) -> None:
        """The vocabulary: *size* ids; those of *special* and *hidden* tokens are neither masked nor drawn.

        Raises:
            ZooError: the tokenizer has no mask token.
        """
        if "mask" not in special:
            raise ZooError("masked_lm needs a tokenizer with a mask token; this one has none")
        self.mask_id = special["mask"]
        maskable = torch.ones(size, dtype=torch.bool, device=self.device)
        maskable[[*special.values(), *hidden]] = False
        self.maskable = maskable

    def metric_names(self) -> list[str]:
        names = ["val/loss", "val/perplexity", "val/accuracy"]
        return [*names, *(["val/bits_per_base"] if self.bases is not None else [])]

    def hide(self, ids: Tensor, valid: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(ids with some tokens replaced, bool [B, L] of those to predict)."""
        assert self.maskable is not None, "set_vocabulary comes before training"
        assert self.mask_id is not None
        draw = torch.rand(2, *ids.shape, generator=generator).to(ids.device)
        if (run := self.config.whole_kmer) > 1:
            # each row is cut into runs at a place of its own, and a run's tokens share one draw
            first = torch.randint(run, (len(ids), 1), generator=generator).to(ids.device)
            piece = (torch.arange(ids.shape[1], device=ids.device) + first) // run  # [B, L]
            draw = draw.gather(2, piece.expand_as(draw).clamp_max(ids.shape[1] - 1))
        chosen = self.maskable[ids] & (draw[0] < self.config.probability)
        if valid is not None:
            chosen &= valid
        choices = self.maskable.nonzero()[:, 0]
        picks = torch.randint(len(choices), ids.shape, generator=generator).to(ids.device)
        hidden = ids.masked_fill(chosen & (draw[1] < self.config.masked), self.mask_id)
        swapped = chosen & (draw[1] >= self.config.masked) & (draw[1] < self.config.masked + self.config.random)
        return torch.where(swapped, choices[picks], hidden), chosen

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        ids, valid = batch["ids"], batch.get("valid")
        generator = None
        if stage != "train":
            seed = int(batch["index"][0]) if "index" in batch else 0
            generator = torch.Generator().manual_seed(seed)
        hidden, chosen = self.hide(ids, valid, generator)
        logits = forward(self.model, {**batch, "ids": hidden})[chosen]  # [N, V]
        targets = ids[chosen]
        weight = torch.tensor(len(targets), device=ids.device)
        if not len(targets):
            return logits.sum() * 0.0, weight
        nats = F.cross_entropy(logits, targets, reduction="none")
        if stage != "train":
            self._count(stage, nats.detach(), logits, targets)
        return nats.mean(), weight

    def _count(self, stage: str, nats: Tensor, logits: Tensor, targets: Tensor) -> None:
        extra = self.extra[stage]
        extra["accuracy"].update((logits.argmax(-1) == targets).float().mean(), len(targets))
        if self.bases is not None:
            bases = self.bases[targets]
            extra["base_nats"].update((nats * (bases > 0)).sum() / bases.sum().clamp_min(1), bases.sum())

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        extra = self.extra[stage]
        values: dict[str, Tensor | float] = {
            "perplexity": self.means[stage].compute().exp(),
            "accuracy": extra["accuracy"].compute(),
        }
        if self.bases is not None:
            values["bits_per_base"] = extra["base_nats"].compute() / math.log(2)
        for metric in extra.values():
            metric.reset()
        return values
