"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn.losses import per_base_loss
from zoo.tasks.base import Batch, Task, forward
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class CausalLMConfig:
    """Next-token prediction.

    Attributes:
        optim: optimiser and schedule.
        objective: `next_token` is the cross entropy of tokens; `per_base`, for k-mer tokenizers, the mean negative
            log-likelihood a base under the marginals of each of the k places (GENERator's BPTrainer), so that a
            k-mer with one wrong base is nearly right.
        specials_as_first: with `per_base`, special tokens count as k-mers of the alphabet's first letter, as in
            GENERator's published training code; otherwise their probability belongs to no base.
        z_loss: weight of the squared z of each position.
        z_of: z is the log of the softmax's `normaliser` (PaLM), or the `max` logit (METAGENE-1, weight 2e-4).
        loss_on_pad: padding counts as a target, as in HyenaDNA's official training; False leaves it out.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: Literal["next_token", "per_base"] = "next_token"
    specials_as_first: bool = False
    z_loss: float = 0.0
    z_of: Literal["normaliser", "max"] = "normaliser"
    loss_on_pad: bool = False

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")
        if self.objective == "per_base" and self.loss_on_pad:
            raise ValueError("loss_on_pad goes with objective=next_token only: padding has no bases")
        if self.specials_as_first and self.objective != "per_base":
            raise ValueError("specials_as_first is an option of objective=per_base")


class CausalLM(Task):
    """Cross entropy of the next token, perplexity, and bits per base. Batches hold ids [B, L] and valid [B, L]."""

    nats: Any
    base_nats: Any
    bases: Tensor | None
    kmers: Tensor | None

    def __init__(self, model: nn.Module, config: CausalLMConfig) -> None:
        super().__init__(model, config)
        self.nats = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        self.base_nats = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        self.register_buffer("bases", None, persistent=False)
        self.register_buffer("kmers", None, persistent=False)
        self.ignored: tuple[int, ...] = (-100,)

    def set_bases(self, bases: list[int]) -> None:
        """How many real bases each token id stands for (0 for special tokens, N and letters that are no base).

        Without it bits per base is not reported, because the ids alone do not say which of them are DNA.
        """
        self.bases = torch.tensor(bases, dtype=torch.long, device=self.device)

    def set_kmers(self, digits: list[list[int]] | None, ignored: tuple[int, ...] = ()) -> None:
        """The base (0 to 3) at each of the k places of each token, -1 for tokens that are no k-mers.

        Args:
            digits: [V][k], None for a tokenizer that has no k-mers.
            ignored: tokens that `per_base` never counts as targets (unknown, padding).

        Raises:
            ZooError: `objective=per_base` needs k-mers and there are none.
        """
        if digits is None:
            if self.config.objective == "per_base":
                raise ZooError(
                    "task.objective=per_base needs a k-mer tokenizer over four letters (tokenizer.name=kmer): the "
                    "tokens of this one are no k-mers; set task.objective=next_token"
                )
            return
        self.kmers = torch.tensor(digits, dtype=torch.long, device=self.device)
        self.ignored = (*ignored, -100)

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
        if self.config.objective == "per_base":
            mean, weight = self.per_base(logits, targets, counted)
        if self.config.z_loss:
            z = torch.logsumexp(logits, -1) if self.config.z_of == "normaliser" else logits.amax(-1)
            mean = mean + self.config.z_loss * (z.square() * counted).sum() / counted.sum().clamp_min(1)
        return mean, weight

    def per_base(self, logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """(nats a base, number of targets that count) of logits [B, L, V]; rows of the vocabulary beyond it are none.

        Raises:
            ZooError: the task was not told of a tokenizer with k-mers.
        """
        if self.kmers is None:
            self.set_kmers(None)
        assert self.kmers is not None
        table = F.pad(self.kmers, (0, 0, 0, logits.shape[-1] - len(self.kmers)), value=-1)
        targets = targets.masked_fill(~counted, -100)
        loss = per_base_loss(
            logits, targets, table, specials_as_first=self.config.specials_as_first, ignored=self.ignored
        )
        skip = torch.stack([targets == token for token in self.ignored]).any(0)
        return loss, (~skip).sum()

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
