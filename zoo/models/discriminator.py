"""The patch discriminator of TiTok's decoder training, and the adversarial losses that go with it.

1d-tokenizer's NLayerDiscriminator (an open-muse variant of PatchGAN with blurred down-sampling); hinge loss: Lim and
Ye 2017 (arXiv 1705.02894); LeCam regularisation: Tseng et al. 2021 (arXiv 2104.03310) eq. 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.conv2d import BlurPool


@config
class PatchDiscriminatorConfig:
    """The defaults are the ones TiTok and TA-TiTok train with.

    Attributes:
        channels: of the picture.
        hidden: channels of the first stage; each later one has twice as many.
        stages: number of halvings.
        blur: side of the binomial kernel before each halving.
        patches: side of the grid of logits, by adaptive max pooling.
    """

    channels: int = 3
    hidden: int = 128
    stages: int = 3
    blur: int = 4
    patches: int = 16


class PatchDiscriminator(nn.Module):
    """Pixels [B, 3, H, W] -> logits [B, 1, patches, patches], large for real pictures."""

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        self.conv_in = nn.Sequential(nn.Conv2d(config.channels, width, 5, padding=2), nn.LeakyReLU(0.1))
        stages = []
        for i in range(config.stages):
            outer = config.hidden * 2**i
            conv = nn.Conv2d(width, outer, 3, padding=1)
            stages.append(nn.Sequential(conv, BlurPool(config.blur), nn.GroupNorm(32, outer), nn.LeakyReLU(0.1)))
            width = outer
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveMaxPool2d(config.patches)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 5, padding=2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss of logits on real and generated pictures: half the sum of both hinges."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(logits of generated pictures)."""
    return -fake.mean()


def lecam_loss(real_mean: Tensor, fake_mean: Tensor, ema_real: Tensor, ema_fake: Tensor) -> Tensor:
    """Keeps the discriminator near its past: squared excess of each side's mean over the other's moving average."""
    return F.relu(real_mean - ema_fake).square().mean() + F.relu(ema_real - fake_mean).square().mean()


class LeCam(nn.Module):
    """The moving averages (*decay* 0.999) of mean logits and the loss against them."""

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(1))
        self.register_buffer("ema_fake", torch.zeros(1))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        real_mean, fake_mean = real.mean(), fake.mean()
        loss = lecam_loss(real_mean, fake_mean, self.ema_real, self.ema_fake)
        with torch.no_grad():
            self.ema_real.mul_(self.decay).add_(real_mean.detach(), alpha=1 - self.decay)
            self.ema_fake.mul_(self.decay).add_(fake_mean.detach(), alpha=1 - self.decay)
        return loss


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """Ratio of the gradient norms of both losses at the decoder's *last_layer* (VQGAN, arXiv 2012.09841 eq. 7)."""
    (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, limit).detach()
