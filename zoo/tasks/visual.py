"""What the tasks of visual tokenizers share: how the codebook is used, and how close the pictures come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.nn.codebook import usage_of_counts
from zoo.nn.image_metrics import psnr
from zoo.tasks.base import Batch, Task
from zoo.tasks.metrics import WeightedMean

RECENT = 65536  # ids that the usage shown in training is counted over, as LlamaGen does


class CodeCounts(Metric):
    """How often each code was used; `compute` gives usage, entropy (bits) and perplexity."""

    full_state_update = False
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ids: Tensor) -> None:
        self.counts += torch.bincount(ids.reshape(-1), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        return usage_of_counts(self.counts)


class VisualTask(Task):
    """Base of the tasks around a `VisualModel`: batches hold pixels [B, 3, S, S] in [0, 1].

    Attributes:
        recent: the last ids that training saw (-1: none yet), and `recent_at`, where the next ones go.
    """

    psnr: Any
    codes: Any
    recent: Tensor
    recent_at: Tensor

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        self.psnr = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})
        size: int | None = model.vocab_size  # type: ignore[assignment]
        self.codes = nn.ModuleDict({stage: CodeCounts(size) for stage in ("val", "test")} if size else {})
        if size:
            self.register_buffer("recent", torch.full((RECENT,), -1, dtype=torch.int32))
            self.register_buffer("recent_at", torch.zeros((), dtype=torch.long))

    def watch(self, ids: Tensor | None, stage: str) -> None:
        """Count the codes of a batch; in training, now and then log how many of the recent ones differ."""
        if ids is None:
            return
        if stage != "train":
            self.codes[stage].update(ids)
            return
        flat = ids.detach().reshape(-1)[:RECENT].to(torch.int32)
        places = (self.recent_at + torch.arange(len(flat), device=flat.device)) % RECENT
        self.recent[places] = flat
        self.recent_at.copy_((self.recent_at + len(flat)) % RECENT)
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            known = self.recent[self.recent >= 0].long()
            found = usage_of_counts(torch.bincount(known, minlength=self.model.vocab_size))
            self.log_dict({f"train/code_{name}": value for name, value in found.items()}, batch_size=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _ = self.compute(batch, "train")
        self.log_training(loss, self.trainer.optimizers[0], batch)
        return loss

    def log_training(self, loss: Tensor, optimizer: Any, batch: Batch) -> None:
        """Log what every task logs of a step."""
        self.log("train/loss", loss.detach(), batch_size=len(batch["index"]), sync_dist=True)
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups), batch_size=1)

    def compare(self, output: Tensor, pixels: Tensor, stage: str) -> None:
        """Count the PSNR of reconstructions, clamped to [0, 1] but not rounded."""
        values = psnr(output.detach().float().clamp(0, 1), pixels)
        self.psnr[stage].update(values.mean(), float(len(values)))

    def note(self, parts: dict[str, Tensor], batch: Batch) -> None:
        """Log the terms of a training loss."""
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=len(batch["index"])
        )

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {}
        if self.psnr[stage].weight > 0:
            values["psnr"] = self.psnr[stage].compute()
        self.psnr[stage].reset()
        if stage in self.codes and int(self.codes[stage].counts.sum()):
            values |= {f"code_{name}": value for name, value in self.codes[stage].compute().items()}
            self.codes[stage].reset()
        return values

    def metric_names(self) -> list[str]:
        codes = ["val/code_usage", "val/code_entropy", "val/code_perplexity"] if len(self.codes) else []
        return ["val/loss", "val/psnr", *codes]
