"""Training a video tokenizer on clips, with the losses of the picture tokenizers taken frame by frame."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.video import VideoModel
from zoo.nn.perceptual import PerceptualConfig
from zoo.tasks.base import Batch
from zoo.tasks.image_reconstruction import AdversarialConfig, ImageReconstruction
from zoo.tasks.optim import OptimConfig


@config
class VideoReconstructionConfig:
    """As for pictures (see `ImageReconstructionConfig`); perceptual loss and discriminator see single frames.

    Attributes:
        optim: of the tokenizer.
        reconstruction: squared or absolute error of the pixels; reconstruction_weight is its weight.
        perceptual_weight: of the perceptual loss, which needs the files that `perceptual` names; 0 trains without.
        perceptual: its terms and weights files.
        bottleneck_weight: of the quantizer's loss (or the weighted KL divergence).
        adversarial: None trains without a discriminator.
        freeze_encoder: train the decoder only.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.99)))
    reconstruction: Literal["mse", "l1"] = "l1"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(lpips=1.0))
    bottleneck_weight: float = 1.0
    adversarial: AdversarialConfig | None = None
    freeze_encoder: bool = False


class VideoReconstruction(ImageReconstruction):
    """Batches hold `pixels` [B, 3, T, H, W] in [0, 1]; every frame counts as a picture in losses and in PSNR.

    Raises:
        ZooError: the model is no video tokenizer.
    """

    def __init__(self, model: nn.Module, config: VideoReconstructionConfig) -> None:
        if not isinstance(model, VideoModel):
            raise ZooError(f"task video_reconstruction trains a video tokenizer, not a {type(model).__name__}")
        super().__init__(model, config)  # type: ignore[arg-type]

    def reconstruct(self, batch: Batch) -> Any:
        """The model's `Reconstruction` of the clips, its output as frames [B T, 3, H, W]."""
        result = self.model(batch["clips"])
        return dataclasses.replace(result, output=frames(result.output))

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        return super().compute(unfold(batch), stage)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(unfold(batch), batch_idx)


def frames(clips: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]."""
    return clips.transpose(1, 2).flatten(0, 1)


def unfold(batch: Batch) -> Batch:
    """The batch with `pixels` as frames, and the clips beside them."""
    return batch if "clips" in batch else {**batch, "clips": batch["pixels"], "pixels": frames(batch["pixels"])}
