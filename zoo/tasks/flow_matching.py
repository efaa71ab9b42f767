"""FlexTok's training: rectified flow given the tokens that nested dropout left (arXiv 2502.13967)."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn.flow import Guidance
from zoo.nn.image_metrics import psnr
from zoo.tasks.base import Batch
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig
from zoo.tasks.visual import VisualTask


@config
class FlowMatchingConfig:
    """The paper's optimiser is not published; the defaults follow the sizes of its models.

    Attributes:
        optim: optimiser and schedule.
        vae: artifact of the frozen VAE that the model holds; needed unless the run starts from a whole FlexTok.
        psnr_tokens: numbers of tokens whose reconstructions are measured in validation; () measures none.
        psnr_steps: Euler steps of those reconstructions. One step gives the mean picture that the tokens allow, which
            has the best PSNR and the least detail; more steps give sharper and less exact ones.
        seed: of the noise in validation.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.01, betas=(0.9, 0.99)))
    vae: str = ""
    psnr_tokens: tuple[int, ...] = ()
    psnr_steps: int = 1
    seed: int = 0


class FlowMatching(VisualTask):
    """mean((velocity - (noise - x))²) at random times and token counts; the same noise in every validation.

    Raises:
        ZooError: the model is not a FlexTok, or has fewer tokens than are to be measured.
    """

    at: Any

    def __init__(self, model: nn.Module, config: FlowMatchingConfig) -> None:
        super().__init__(model, config)
        if not getattr(model, "ordered", False):
            raise ZooError(f"task flow_matching trains a FlexTok, not a {type(model).__name__}")
        too_many = [k for k in config.psnr_tokens if not 1 <= k <= model.num_tokens]  # type: ignore[operator]
        if too_many:
            raise ZooError(f"task.psnr_tokens holds {too_many[0]}, but the model has 1 to {model.num_tokens} tokens")
        names = [f"psnr_{k}" for k in config.psnr_tokens]
        self.at = nn.ModuleDict({stage: nn.ModuleDict({n: WeightedMean() for n in names}) for stage in ("val", "test")})

    def set_vae(self, vae: nn.Module) -> None:
        """Fill the model's VAE.

        Raises:
            ZooError: the model has none, or one of another shape.
        """
        own: Any = self.model.vae
        if own is None or own.config.stack != vae.config.stack:  # type: ignore[union-attr]
            raise ZooError("task.vae is of another shape than model.vae says")
        own.load_state_dict(vae.state_dict())

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        pixels = batch["pixels"]
        weight = pixels.new_tensor(len(pixels))
        if stage == "train":
            result = self.model(pixels)
            self.watch(result.ids, stage)
            return result.loss, weight
        devices = [pixels.device] if pixels.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed * 1_000_003 + int(batch["index"][0]))
            result = self.model(pixels)
            self.watch(result.ids, stage)
            self._measure(result.ids, pixels, stage)
        return result.loss, weight

    def _measure(self, ids: Tensor, pixels: Tensor, stage: str) -> None:
        for k in self.config.psnr_tokens:
            output = self.model.decode(ids[:, :k], steps=self.config.psnr_steps, guidance=Guidance())
            values = psnr(output.float().clamp(0, 1), pixels)
            self.at[stage][f"psnr_{k}"].update(values.mean(), float(len(values)))

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values = super().finish(stage)
        for name, mean in self.at[stage].items():
            values[name] = mean.compute()
            mean.reset()
        return values

    def metric_names(self) -> list[str]:
        names = [f"val/psnr_{k}" for k in self.config.psnr_tokens]
        return [*(name for name in super().metric_names() if name != "val/psnr"), *names]
