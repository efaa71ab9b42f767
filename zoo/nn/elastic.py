"""Elastic prefixes: representations whose first k entries are useful for every k.

Nested dropout (Rippel et al. 2014, arXiv 1402.0915) as FlexTok (arXiv 2502.13967, section 3.2), MQT (arXiv
2405.19315) and Matryoshka embeddings use it: one k is drawn a sample, and what stands behind it is dropped or masked.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

SizeSampling = Literal["uniform", "pow2", "uniform_pow2"]


def sample_keep(
    batch: int,
    n: int,
    mode: SizeSampling = "uniform",
    minimum: int = 1,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """[batch] int64 numbers of entries to keep, between *minimum* and *n*.

    `uniform`: every number alike. `pow2`: powers of two (and n) alike. `uniform_pow2`: a pair of neighbouring powers
    of two, then every number between them, so that small counts are as frequent as large ones.
    """
    if mode == "uniform":
        return torch.randint(minimum, n + 1, (batch,), device=device, generator=generator)
    powers = sorted({2**i for i in range(int(math.log2(n)) + 1) if 2**i >= minimum} | {minimum, n})
    steps = torch.tensor(powers, device=device)
    if mode == "pow2" or len(powers) == 1:
        return steps[torch.randint(len(powers), (batch,), device=device, generator=generator)]
    pair = torch.randint(len(powers) - 1, (batch,), device=device, generator=generator)
    low, high = steps[pair], steps[pair + 1]
    u = torch.rand(batch, device=device, generator=generator)
    return (low + (u * (high - low + 1)).long()).clamp_max(high)


def prefix_mask(keep: Tensor, n: int) -> Tensor:
    """[B] -> [B, n] bool, True for the first `keep` entries."""
    return torch.arange(n, device=keep.device) < keep[:, None]


class NestedDropout(nn.Module):
    """x [B, K, D] with all entries behind the first k replaced by a learned vector (FlexTok keeps their places).

    In training k is drawn for each sample; otherwise nothing is dropped unless *keep* [B] says so.
    """

    def __init__(self, d_model: int, mode: SizeSampling = "uniform") -> None:
        super().__init__()
        self.mode = mode
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            if not self.training:
                return x
            keep = sample_keep(x.shape[0], x.shape[1], self.mode, device=x.device)
        return torch.where(prefix_mask(keep.to(x.device), x.shape[1])[..., None], x, self.mask_token.to(x.dtype))
