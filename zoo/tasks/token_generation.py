"""Generators on the tokens of pictures: MaskGIT's masked prediction, RAR's random orders, plain raster order.

MaskGIT: Chang et al. 2022 (arXiv 2202.04200) section 3.2. RAR: Yu et al. 2024 (arXiv 2411.00776) section 3.2.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.maskgit import MaskGIT, mask_tokens, masked_loss
from zoo.models.rar import RAR, random_orders, random_share
from zoo.tasks.base import Batch, Task
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class TokenGenerationConfig:
    """Which loss it is follows from the model.

    Attributes:
        optim: optimiser and schedule.
        random_until, raster_from: RAR only: all orders are random up to the first optimiser step, none from the second
            on, the share falling between them (125,000 and 187,500 in the paper). 0 and 0 is a plain autoregressive
            model in raster order.
        seed: of the masks in validation.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, weight_decay=0.03, betas=(0.9, 0.96)))
    random_until: int = 0
    raster_from: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.raster_from < self.random_until:
            raise ValueError(
                f"raster_from ({self.raster_from}) must not come before random_until ({self.random_until})"
            )


class TokenGeneration(Task):
    """Batches hold ids [B, L] and labels [B] (classes). Validation: raster order, or the same masks each time.

    Raises:
        ZooError: the model is neither a MaskGIT nor a RAR.
    """

    accuracy: Any

    def __init__(self, model: nn.Module, config: TokenGenerationConfig) -> None:
        super().__init__(model, config)
        if not isinstance(model, MaskGIT | RAR):
            raise ZooError(f"task token_generation trains a MaskGIT or a RAR, not a {type(model).__name__}")
        self.masked = isinstance(model, MaskGIT)
        stages = ("val", "test") if self.masked else ()
        self.accuracy = nn.ModuleDict({stage: WeightedMean() for stage in stages})

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        ids, classes = batch["ids"], batch["labels"]
        weight = classes.new_tensor(len(ids))
        if stage == "train":
            classes = self.model.drop_classes(classes)
            return self._masked(ids, classes, stage) if self.masked else self._ordered(ids, classes), weight
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed * 1_000_003 + int(batch["index"][0]))
            loss = self._masked(ids, classes, stage) if self.masked else self._ordered(ids, classes, raster=True)
        return loss, weight

    def _masked(self, ids: Tensor, classes: Tensor, stage: str) -> Tensor:
        options = self.model.config
        masked, mask = mask_tokens(ids, self.model.mask_id)
        logits = self.model(masked, classes).float()
        smoothing = options.label_smoothing if stage == "train" else 0.0
        loss, correct = masked_loss(logits, ids, mask, smoothing, options.unmasked_weight)
        if stage != "train":
            self.accuracy[stage].update(correct, float(len(ids)))
        return loss

    def _ordered(self, ids: Tensor, classes: Tensor, raster: bool = False) -> Tensor:
        config = self.config
        share = 0.0
        if not raster and config.raster_from:
            share = random_share(self.trainer.global_step, config.random_until, config.raster_from)
            self.log("train/random_orders", share, batch_size=1)
        return self.model.loss(ids, classes, random_orders(len(ids), ids.shape[1], share, ids.device)).float()

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        if not self.masked:
            return {}
        value = self.accuracy[stage].compute()
        self.accuracy[stage].reset()
        return {"accuracy": value}

    def metric_names(self) -> list[str]:
        return ["val/loss", *(["val/accuracy"] if self.masked else [])]
