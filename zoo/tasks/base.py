"""What all tasks share: one model, one config, the optimiser, and logging by stage."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from zoo.config import to_dict
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig, layer_scales, make_optimizer

Batch = dict[str, Tensor]


class Task(pl.LightningModule):
    """A LightningModule around one model. Subclasses implement `compute` and may extend `metrics`.

    Attributes:
        total_steps: optimiser steps of the whole run, which the schedule needs; set by whoever runs the training.
        frozen: parts of the model that stay in evaluation mode in training, without dropout.
        metrics: per stage (`val`, `test`) a module dict of torchmetrics, logged at the end of the stage's loop.
    """

    model: Any
    means: Any

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.total_steps: int | None = None
        self.frozen: list[nn.Module] = []
        # only plain dicts: anything else could not be read back with weights_only=True
        self.save_hyperparameters({"task": to_dict(config)})
        self.means = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """(loss to minimise, weight): the mean loss of *batch* and how many items (tokens, samples) it is a mean of."""
        raise NotImplementedError

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        """Metrics of a finished validation or test loop, without the stage's prefix; resets what it read."""
        return {}

    def metric_names(self) -> list[str]:
        """What a validation reports, for choosing `trainer.monitor`."""
        return ["val/loss"]

    def train(self, mode: bool = True) -> Task:
        """Switch modes, but for the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _ = self.compute(batch, "train")
        self.log("train/loss", loss.detach(), batch_size=len(batch["ids"]), sync_dist=True)
        optimizer = self.trainer.optimizers[0]
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups), batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        loss, weight = self.compute(batch, stage)
        self.means[stage].update(loss.detach(), weight)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        values: dict[str, Any] = {"loss": self.means[stage].compute(), **self.finish(stage)}
        self.means[stage].reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    def configure_model(self) -> None:
        """Shard the model where Lightning has laid out the ranks for it (`trainer.strategy=fsdp`)."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            for layer in self.model.backbone.layers if hasattr(self.model, "backbone") else ():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        named = dict(self.model.named_parameters())
        head = {id(p) for name, p in named.items() if name.startswith(("head.", "chunk_head."))}
        scales = None
        if self.optim.layer_decay != 1.0:
            scales = {id(named[name]): s for name, s in layer_scales(named, self.optim.layer_decay).items()}
        # Lightning refuses to clip for an optimiser that can unscale by itself, as the fused one can
        fused = not str(self.trainer.precision).endswith("-mixed")
        optimizer, schedule = make_optimizer(self.model.param_groups(), self.optim, total, fused, head, scales)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits in float32, whatever the precision of the run: losses are never taken in half precision.

    Rows of packed documents (`segment` [B, L]) are read with the documents kept apart.
    """
    segment = {"segment": batch["segment"]} if "segment" in batch else {}
    return model(batch["ids"], batch.get("valid"), **segment).float()
