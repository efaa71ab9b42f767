"""TiTok's stage 1: predict the codes that a frozen MaskGIT-VQGAN gives the picture (arXiv 2406.07550, section 3.3)."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.tasks.base import Batch
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig
from zoo.tasks.visual import VisualTask


@config
class ProxyCodesConfig:
    """The defaults are the published stage 1.

    Attributes:
        optim: optimiser and schedule.
        vqgan: artifact of the MaskGIT-VQGAN that gives the codes.
        bottleneck_weight: of the quantizer's loss.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.99)))
    vqgan: str
    bottleneck_weight: float = 1.0


class ProxyCodes(VisualTask):
    """Cross entropy of the teacher's codes plus the quantizer's loss; accuracy is that of the likeliest code.

    Raises:
        ZooError: the model predicts pixels.
    """

    accuracy: Any

    def __init__(self, model: nn.Module, config: ProxyCodesConfig) -> None:
        super().__init__(model, config)
        if getattr(model.config, "target", "") != "proxy" or model.config.pixel_decoder is not None:  # type: ignore[union-attr]
            raise ZooError("task proxy_codes trains a stage-1 TiTok: set model.target=proxy and no model.pixel_decoder")
        self.teacher: list[Any] = []  # in a list: neither trained nor part of a checkpoint
        self.accuracy = nn.ModuleDict({stage: WeightedMean() for stage in ("val", "test")})

    def set_vqgan(self, vqgan: nn.Module) -> None:
        """The teacher.

        Raises:
            ZooError: its grid of codes is not the model's, or it has another number of codes.
        """
        config: Any = self.model.config
        codes = vqgan.vocab_size
        if codes != config.proxy_codes:
            raise ZooError(f"model.proxy_codes is {config.proxy_codes}, but the MaskGIT-VQGAN has {codes} codes")
        grid, wanted = vqgan.num_tokens, (config.preprocess.size // config.decoder_patch) ** 2
        if grid != wanted:
            raise ZooError(f"the MaskGIT-VQGAN gives {grid} codes a picture, the model's decoder predicts {wanted}")
        self.teacher = [vqgan.requires_grad_(False).eval()]

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, patches] codes of the teacher."""
        if not self.teacher:
            raise ZooError("task proxy_codes has no MaskGIT-VQGAN: name its artifact as task.vqgan")
        self.teacher[0].to(pixels.device)
        return self.teacher[0].encode(pixels).flatten(1)

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        pixels = batch["pixels"]
        codes = self.targets(pixels)
        result = self.model(pixels)
        logits = result.output.float().flatten(2)  # [B, V, patches]
        proxy = F.cross_entropy(logits, codes)
        bottleneck = self.config.bottleneck_weight * result.loss.float()
        self.watch(result.ids, stage)
        if stage == "train":
            self.note({"proxy": proxy, "bottleneck": bottleneck} | result.parts, batch)
        else:
            hit = (logits.argmax(1) == codes).float().mean()
            self.accuracy[stage].update(hit, float(len(pixels)))
        return proxy + bottleneck, pixels.new_tensor(len(pixels))

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values = {"accuracy": self.accuracy[stage].compute(), **super().finish(stage)}
        self.accuracy[stage].reset()
        return values

    def metric_names(self) -> list[str]:
        return ["val/accuracy", *(name for name in super().metric_names() if name != "val/psnr")]
