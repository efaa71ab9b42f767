"""Next-block prediction on the tokens of clips (Ren et al. 2025, arXiv:2502.07737, section 3)."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.nbp import NBP
from zoo.tasks.base import Batch, Task
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class NextBlockConfig:
    """The defaults are those of the released base models.

    Attributes:
        optim: optimiser and schedule.
    """

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95), warmup_steps=10_000, min_lr_ratio=0.0
        )
    )


class NextBlock(Task):
    """Batches hold ids [B, T, H, W] and, for a model with a condition, labels [B].

    Raises:
        ZooError: the model is no NBP.
    """

    accuracy: Any

    def __init__(self, model: nn.Module, config: NextBlockConfig) -> None:
        super().__init__(model, config)
        if not isinstance(model, NBP):
            raise ZooError(f"task next_block trains an NBP, not a {type(model).__name__}")
        self.accuracy = nn.ModuleDict(
            {f"{stage}_{name}": WeightedMean() for stage in ("val", "test") for name in ("acc1", "acc5")}
        )

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        cond = batch.get("labels") if self.model.config.cond_tokens else None
        found = self.model.loss(batch["ids"], cond)
        weight = batch["ids"].new_tensor(found["logits"].shape[0] * found["logits"].shape[1])
        if stage != "train":
            for name in ("acc1", "acc5"):
                self.accuracy[f"{stage}_{name}"].update(found[name], weight)
        return found["loss"], weight

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {}
        for name in ("acc1", "acc5"):
            metric = self.accuracy[f"{stage}_{name}"]
            values[name] = metric.compute()
            metric.reset()
        return values

    def metric_names(self) -> list[str]:
        return ["val/loss", "val/acc1", "val/acc5"]
