"""The VAE bottleneck: a diagonal Gaussian predicted by the encoder (Kingma and Welling 2013, arXiv 1312.6114)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussian:
    """Gaussian whose moments stand side by side: *moments* holds [mean, log variance] along axis *dim*.

    The log variance is clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor, dim: int = 1) -> None:
        self.mean, logvar = moments.float().chunk(2, dim=dim)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std · noise, differentiable in the moments."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """KL divergence to the standard normal, summed over *dims*."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=list(dims))
