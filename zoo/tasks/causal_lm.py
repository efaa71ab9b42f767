"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.tasks.base import Batch, Task, forward
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class CausalLMConfig:
    """Next-token prediction.

    Attributes:
        optim: optimiser and schedule.
        z_loss: weight of the squared log of the softmax's normaliser (PaLM; METAGENE-1 trains with 2e-4).
        loss_on_pad: padding counts as a target, as in HyenaDNA's official training; False leaves it out.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    z_loss: float = 0.0
    loss_on_pad: bool = False


class CausalLM(Task):
    """Cross entropy of the next token, perplexity, and bits per base. Batches hold ids [B, L] and valid [B, L]."""

    nats: Any
    base_nats: Any
    bases: Tensor | None

    def __init__(self, model: nn.Module, config: CausalLMConfig) -> None:
        super().__init__(model, config)
        self.nats = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        self.base_nats = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        self.register_buffer("bases", None, persistent=False)

    def set_bases(self, bases: list[int]) -> None:
        """How many real bases each token id stands for (0 for special tokens, N and letters that are no base).

        Without it bits per base is not reported, because the ids alone do not say which of them are DNA.
        """
        self.bases = torch.tensor(bases, dtype=torch.long, device=self.device)

    def metric_names(self) -> list[str]:
        return ["val/loss", "val/perplexity", *(["val/bits_per_base"] if self.bases is not None else [])]

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        logits = forward(self.model, batch)[:, :-1]  # [B, L-1, V]
        targets = batch["ids"][:, 1:]
        counted = torch.ones_like(targets, dtype=torch.bool)
        if "valid" in batch and not self.config.loss_on_pad:
            # a pad on either side: neither is padding predicted, nor is anything predicted from padding
            counted = batch["valid"][:, 1:] & batch["valid"][:, :-1]
        if "segment" in batch:  # the first token of a packed document follows nothing
            counted = counted & (batch["segment"][:, 1:] == batch["segment"][:, :-1])
        nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [B, L-1]
        weight = counted.sum()
        mean = (nats * counted).sum() / weight.clamp_min(1)
        if stage != "train":
            self._count(stage, nats, targets, counted, mean, weight)
        if self.config.z_loss:
            z = torch.logsumexp(logits, -1).square()
            mean = mean + self.config.z_loss * (z * counted).sum() / weight.clamp_min(1)
        return mean, weight

    def _count(self, stage: str, nats: Tensor, targets: Tensor, counted: Tensor, mean: Tensor, weight: Tensor) -> None:
        self.nats[stage].update(mean.detach(), weight)
        if self.bases is not None:
            bases = self.bases[targets.clamp_max(len(self.bases) - 1)] * counted
            total = bases.sum()
            self.base_nats[stage].update((nats * (bases > 0)).sum().detach() / total.clamp_min(1), total)

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {"perplexity": self.nats[stage].compute().exp()}
        self.nats[stage].reset()
        if self.bases is not None:
            values["bits_per_base"] = self.base_nats[stage].compute() / math.log(2)
            self.base_nats[stage].reset()
        return values
