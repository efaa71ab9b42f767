"""Rectified flow: noise levels for training, Euler integration with classifier-free or adaptive projected guidance.

x_t = t · noise + (1 - t) · x and the model predicts noise - x, with t from 1 (noise) to 0 (Liu et al. 2022, arXiv
2209.03003). Levels: Esser et al. 2024 (SD3, arXiv 2403.03206) section 3.1. Guidance: Sadat et al. 2024 (APG, arXiv
2410.02416) algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.config import config


@config
class NoiseConfig:
    """The distribution of training noise levels.

    Attributes:
        kind: `uniform`, `lognorm` (sigmoid of a standard normal) or `mode` (SD3's, heavier in the middle).
        stratified: `lognorm` only: one draw from each of B equal slices of the distribution.
        shift: s > 1 moves all levels towards noise, t → s t / (1 + (s - 1) t) (SD3, eq. 23), as redundant data (large
            pictures, plain pixels) need.
        mode_scale: s of `mode`: 1 - u - s (cos²(πu/2) - 1 + u); FlexTok's forks use 0.25, SD3 1.29.
    """

    kind: Literal["uniform", "lognorm", "mode"] = "mode"
    stratified: bool = False
    mode_scale: float = 0.25
    shift: float = 1.0


def noise_levels(config: NoiseConfig, draw: Tensor) -> Tensor:
    """Levels t in (0, 1) from raw draws [B]: standard normal ones for plain `lognorm`, else uniform ones in [0, 1)."""
    if config.kind == "lognorm":
        if config.stratified:
            slices = torch.arange(len(draw), device=draw.device, dtype=draw.dtype) / len(draw)
            u = slices + draw / len(draw)
            draw = torch.erfinv(2 * u - 1) * math.sqrt(2)
        return torch.sigmoid(draw)
    if config.kind == "mode":
        return 1 - draw - config.mode_scale * (torch.cos(math.pi / 2 * draw) ** 2 - 1 + draw)
    return draw


def sample_levels(
    config: NoiseConfig, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """[batch] random levels."""
    normal = config.kind == "lognorm" and not config.stratified
    draw = (torch.randn if normal else torch.rand)(batch, device=device, generator=generator)
    t = noise_levels(config, draw)
    return t if config.shift == 1 else config.shift * t / (1 + (config.shift - 1) * t)


def add_noise(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """t · noise + (1 - t) · x with one level t a sample."""
    t = level.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return t * noise + (1 - t) * x


@dataclass(frozen=True)
class Guidance:
    """How conditional and unconditional velocities are combined.

    Attributes:
        scale: 1 for none.
        projected: APG instead of plain guidance.
        momentum: weight of the running difference (APG).
        threshold: largest norm of the difference over a sample, 0 for no limit (APG).
        eta: part kept of the component parallel to the conditional velocity (APG).
    """

    scale: float = 1.0
    projected: bool = False
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0


class Guide:
    """Applies a `Guidance` over the steps of one sampling run (APG's momentum is its state)."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.running: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        g = self.guidance
        difference = cond - uncond
        if not g.projected:
            return uncond + g.scale * difference
        if self.running is not None:
            difference = difference + g.momentum * self.running
        self.running = difference
        dims = list(range(1, cond.ndim))
        if g.threshold > 0:
            norm = difference.norm(p=2, dim=dims, keepdim=True)
            difference = difference * torch.minimum(torch.ones_like(norm), g.threshold / norm)
        wide, along = difference.double(), cond.double()  # orthogonality is lost in float32
        along = along / along.norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
        parallel = (wide * along).sum(dim=dims, keepdim=True) * along
        update = (wide - parallel) + g.eta * parallel
        return cond + (g.scale - 1) * update.to(cond.dtype)


def euler(
    velocity: Callable[[Tensor, Tensor, bool], Tensor], start: Tensor, steps: int, guidance: Guidance | None = None
) -> Tensor:
    """Integrate from noise *start* (t = 1) to t = 0 in equal steps.

    *velocity*(x, t [B], unconditional) is called once a step, twice where the guidance scale is not 1.
    """
    guidance = guidance or Guidance()
    guide = Guide(guidance)
    x = start
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps, device=x.device)
        v = velocity(x, t, False)
        if guidance.scale != 1:
            v = guide(v, velocity(x, t, True))
        x = x - v / steps
    return x
