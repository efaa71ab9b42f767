"""Training a visual tokenizer on pictures: reconstruction, perceptual, bottleneck and adversarial losses.

TiTok's one-stage form and its stage 2 (Yu et al. 2024, arXiv 2406.07550, section 3.3; Kim et al. 2025, arXiv
2501.07730). Discriminator losses: see zoo/models/discriminator.py.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.discriminator import (
    LeCam,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from zoo.nn.perceptual import PerceptualConfig, PerceptualLoss
from zoo.tasks.base import Batch
from zoo.tasks.optim import OptimConfig, make_optimizer
from zoo.tasks.visual import VisualTask


@config
class AdversarialConfig:
    """A discriminator beside the tokenizer.

    Attributes:
        weight: of the generator's loss (TiTok stage 2: 0.01; one-stage and TA-TiTok: 0.1).
        start_step: optimiser step of the tokenizer from which the discriminator is trained and used.
        lecam: weight of the LeCam regularisation, 0 leaves it out.
        adaptive: also scale by the ratio of gradient norms at the last layer, as VQGAN does; TiTok does not.
        discriminator: network.
        optim: its optimiser; the schedule runs over the steps that are left from start_step on.
    """

    weight: float = 0.1
    start_step: int = 20_000
    lecam: float = 0.001
    adaptive: bool = False
    discriminator: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.999)))


@config
class ImageReconstructionConfig:
    """The defaults are TA-TiTok's weights, without a discriminator.

    Attributes:
        optim: of the tokenizer.
        reconstruction: squared or absolute error of the pixels; reconstruction_weight is its weight.
        perceptual_weight: of the perceptual loss. It needs the files that `perceptual` names; training without it
            takes an explicit 0.
        perceptual: its terms and weights files.
        bottleneck_weight: of the quantizer's loss (or the weighted KL divergence).
        adversarial: None trains without a discriminator.
        freeze_encoder: train the decoders only (stage 2).
        vqgan: artifact of the MaskGIT-VQGAN whose codebook and decoder a stage 2 starts from.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.999)))
    reconstruction: Literal["mse", "l1"] = "mse"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.1
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(lpips=1.0, convnext=0.1))
    bottleneck_weight: float = 1.0
    adversarial: AdversarialConfig | None = None
    freeze_encoder: bool = False
    vqgan: str = ""


class ImageReconstruction(VisualTask):
    """Reconstruction in [0, 1]; with a discriminator the two optimisers are stepped by hand.

    Then Lightning neither accumulates nor clips: `accumulate` and `grad_clip` are the run's numbers, and
    `trainer.global_step` counts the tokenizer's optimiser steps alone.

    Attributes:
        accumulate: batches an optimiser step.
        grad_clip: largest gradient norm of each network, 0 for none.

    Raises:
        ZooError: a perceptual term without its weights, or a model that makes no pixels.
    """

    discriminator: Any
    lecam: Any

    def __init__(self, model: nn.Module, config: ImageReconstructionConfig) -> None:
        super().__init__(model, config)
        self.accumulate, self.grad_clip = 1, 0.0
        if getattr(model.config, "target", "pixels") == "proxy" and model.config.pixel_decoder is None:  # type: ignore[union-attr]
            raise ZooError("a stage-1 TiTok makes no pixels: train it with task proxy_codes")
        if config.freeze_encoder:
            if not hasattr(model, "freeze_encoder"):
                raise ZooError(f"task.freeze_encoder: a {type(model).__name__} has no part that stands still")
            model.freeze_encoder()  # type: ignore[operator]
        if config.perceptual_weight and not (config.perceptual.lpips or config.perceptual.convnext):
            raise ZooError("task.perceptual has no term: set task.perceptual_weight=0 to train without it")
        try:
            # in a list: a hundred megabytes of frozen weights do not belong in every checkpoint
            self._perceptual = [PerceptualLoss(config.perceptual)] if config.perceptual_weight else []
        except ZooError as error:
            raise ZooError(f"{error}; task.perceptual_weight=0 trains without a perceptual loss") from None
        if config.adversarial is not None:
            self.automatic_optimization = False
            self.discriminator = PatchDiscriminator(config.adversarial.discriminator)
            self.lecam = LeCam() if config.adversarial.lecam else None

    @property
    def perceptual(self) -> PerceptualLoss | None:
        """The frozen perceptual loss, on the task's device; None where it is switched off."""
        return self._perceptual[0].to(self.device) if self._perceptual else None

    def train(self, mode: bool = True) -> ImageReconstruction:
        super().train(mode)
        if self.config.freeze_encoder:
            self.model.encoder.eval()
            if self.model.quantizer is not None:
                self.model.quantizer.eval()  # a codebook that stands still is not moved by restarts either
        return self

    def set_vqgan(self, vqgan: nn.Module) -> None:
        """Start the pixel decoder of a stage 2 from a MaskGIT-VQGAN.

        Raises:
            ZooError: the model has no pixel decoder, or one of another shape.
        """
        if getattr(self.model, "pixel_decoder", None) is None:
            raise ZooError("task.vqgan is for stage 2: the model has no pixel_decoder to start from it")
        self.model.adopt_vqgan(vqgan)

    def reconstruct(self, batch: Batch) -> Any:
        """The model's `Reconstruction` of a batch."""
        text = {"text": batch["text"]} if "text" in batch else {}
        return self.model(batch["pixels"], **text)

    def losses(self, result: Any, pixels: Tensor) -> dict[str, Tensor]:
        """The weighted terms that do not need the discriminator; `loss` is their sum."""
        config = self.config
        output = result.output.float()
        distance = F.mse_loss if config.reconstruction == "mse" else F.l1_loss
        terms = {"reconstruction": config.reconstruction_weight * distance(output, pixels)}
        if (perceptual := self.perceptual) is not None:
            terms["perceptual"] = config.perceptual_weight * perceptual(output, pixels)
        terms["bottleneck"] = config.bottleneck_weight * result.loss.float()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        pixels = batch["pixels"]
        result = self.reconstruct(batch)
        terms = self.losses(result, pixels)
        self.watch(result.ids, stage)
        if stage == "train":
            self.note({name: value for name, value in terms.items() if name != "loss"} | result.parts, batch)
        else:
            self.compare(result.output, pixels, stage)
        return terms["loss"], pixels.new_tensor(len(pixels))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        pixels = batch["pixels"]
        optimizers: Any = self.optimizers()
        schedules: Any = self.lr_schedulers()
        first, second = optimizers
        second._on_before_step = second._on_after_step = _nothing  # or global_step would count both optimisers
        active = self.trainer.global_step >= self.config.adversarial.start_step
        stepping = (batch_idx + 1) % self.accumulate == 0

        result = self.reconstruct(batch)
        terms = self.losses(result, pixels)
        loss = terms["loss"]
        parts = {name: value for name, value in terms.items() if name != "loss"} | result.parts
        if active:
            parts["generator"] = self._generator(result.output, terms["reconstruction"])
            loss = loss + parts["generator"]
        self.manual_backward(loss / self.accumulate)
        if stepping:
            self._step(first, schedules[0])
        if active:
            parts |= self._discriminate(pixels, result.output.detach())
            if stepping:
                self._step(second, schedules[1])
        self.watch(result.ids, "train")
        self.note(parts, batch)
        self.log_training(loss, first, batch)
        return loss.detach()

    def _generator(self, output: Tensor, reconstruction: Tensor) -> Tensor:
        """The weighted adversarial loss of reconstructions; the discriminator gets no gradient from it."""
        config = self.config.adversarial
        self.discriminator.requires_grad_(False)
        loss = generator_loss(self.discriminator(output).float())
        self.discriminator.requires_grad_(True)
        weight = config.weight
        if config.adaptive:
            weight = weight * adaptive_weight(reconstruction, loss, self.model.last_layer)
        return weight * loss

    def _discriminate(self, pixels: Tensor, output: Tensor) -> dict[str, Tensor]:
        """The discriminator's loss and its backward pass."""
        real, fake = self.discriminator(pixels).float(), self.discriminator(output).float()
        parts = {"discriminator": hinge_loss(real, fake), "logits_real": real.mean(), "logits_fake": fake.mean()}
        loss = parts["discriminator"]
        if self.lecam is not None:
            parts["lecam"] = self.config.adversarial.lecam * self.lecam(real, fake)
            loss = loss + parts["lecam"]
        self.manual_backward(loss / self.accumulate)
        return parts

    def _step(self, optimizer: Any, schedule: Any) -> None:
        if self.grad_clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.grad_clip, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return super().configure_optimizers()
        if str(self.trainer.precision) == "16-mixed":
            raise ZooError(
                "a discriminator is trained in 32-true or bf16-mixed: one gradient scaler cannot serve two losses"
            )
        config = self.config.adversarial
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        fused = not str(self.trainer.precision).endswith("-mixed")
        groups = [
            (self.model.param_groups(), self.optim, total),
            ([{"params": list(self.discriminator.parameters())}], config.optim, max(total - config.start_step, 1)),
        ]
        pairs = [make_optimizer(params, optim, steps, fused) for params, optim, steps in groups]
        return [one for one, _ in pairs], [schedule for _, schedule in pairs]


def _nothing() -> None:
    """Stands for Lightning's counting of an optimiser's steps."""
