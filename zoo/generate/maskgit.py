"""Parallel decoding with masks: predict all, keep the most certain, mask the rest again (MaskGIT, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.generate.loop import decode

Draw = Callable[[torch.Size], Tensor]


@dataclass(frozen=True)
class MaskGITSampling:
    """How one picture is generated.

    Attributes:
        steps: forward passes (twice as many with guidance).
        temperature: of the Gumbel noise on logits and confidences; it falls linearly to 0.
        guidance: scale of classifier-free guidance, 0 for none.
        decay: `constant`, `linear` (from 0 at the first step) or `power-cosine`.
        power: exponent of `power-cosine`.
        anneal: also divide the logits by 0.5 + 0.8 (1 - progress), as TiTok's sampling script always does.
    """

    steps: int = 8
    temperature: float = 9.5
    guidance: float = 4.5
    decay: Literal["constant", "linear", "power-cosine"] = "linear"
    power: float = 3.0
    anneal: bool = True


def masked_after(length: int, steps: int, step: int, masked: int) -> int:
    """Tokens left masked after *step* (from 0) when *masked* were before: floor(length · acos(r) / (π/2)), at least
    one unless it is the last step, and fewer than before."""
    wanted = math.floor(length * math.acos((step + 1) / steps) / (math.pi / 2))
    return max(1, min(masked - 1, wanted))


def guidance_at(sampling: MaskGITSampling, step: int) -> float:
    """Guidance scale of *step*."""
    if sampling.decay == "linear":
        return step / sampling.steps * sampling.guidance
    if sampling.decay == "power-cosine":
        return power_cosine(sampling.guidance, step / sampling.steps, sampling.power)
    return sampling.guidance


def power_cosine(guidance: float, progress: float, power: float) -> float:
    """1 + (g - 1) (1 - cos(π progress^power)) / 2 (MDT, arXiv 2303.14389)."""
    return (guidance - 1) * (1 - math.cos(math.pi * progress**power)) / 2 + 1


def gumbel(shape: torch.Size, draw: Draw) -> Tensor:
    """Gumbel noise from uniform draws."""
    return -(-draw(shape).clamp_min(1e-20).log()).clamp_min(1e-20).log()


class ByConfidence:
    """MaskGIT's order of decoding: all masked places at once, of which the most certain ones stay.

    Args:
        ids: [B, L], all of them *mask_id*.
        mask_id: the token of a masked place.
        sampling: see MaskGITSampling.
        draw: uniform numbers, asked for only where the temperature is above 0.
        watch: sees the ids before each step.
    """

    def __init__(
        self, ids: Tensor, mask_id: int, sampling: MaskGITSampling, draw: Draw, watch: Callable[[Tensor], None] | None
    ) -> None:
        self.ids = ids
        self.mask_id = mask_id
        self.sampling = sampling
        self.draw = draw
        self.watch = watch
        self.step = 0

    def next(self) -> Tensor | None:
        if self.step == self.sampling.steps:
            return None
        if self.watch is not None:
            self.watch(self.ids)
        return self.ids

    def guided(self, logits_of: Callable[[Tensor, bool], Tensor], ids: Tensor) -> Tensor:
        """Logits of *ids* with this step's guidance."""
        sampling = self.sampling
        scale = guidance_at(sampling, self.step) if sampling.guidance else 0.0
        logits = logits_of(ids, False)
        if sampling.guidance and sampling.decay == "power-cosine":
            base = logits_of(ids, True)
            return base + (logits - base) * scale
        return logits + (logits - logits_of(ids, True)) * scale if scale else logits

    def take(self, ids: Tensor, logits: Tensor) -> None:
        sampling = self.sampling
        progress = (self.step + 1) / sampling.steps
        logits = logits.float()
        if sampling.anneal:
            logits = logits / (0.5 + 0.8 * (1 - progress))
        temperature = sampling.temperature * (1 - progress)
        noisy = logits + temperature * gumbel(logits.shape, self.draw) if sampling.temperature else logits
        masked = ids == self.mask_id
        chosen = torch.where(masked, noisy.argmax(-1), ids)
        certainty = logits.gather(-1, chosen[..., None])[..., 0].masked_fill(~masked, math.inf)
        if sampling.temperature:
            certainty = certainty + temperature * gumbel(certainty.shape, self.draw)
        if self.step + 1 < sampling.steps:
            # one count for the batch, the first sample's, as the official code has it
            count = masked_after(ids.shape[1], sampling.steps, self.step, int(masked[0].sum()))
            cutoff = certainty.sort(-1).values[:, count : count + 1]
            chosen = torch.where(certainty < cutoff, self.mask_id, chosen)
        self.ids = chosen
        self.step += 1


@torch.no_grad()
def maskgit(
    logits_of: Callable[[Tensor, bool], Tensor],
    batch: int,
    length: int,
    mask_id: int,
    sampling: MaskGITSampling,
    draw: Draw,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Generate ids [batch, length].

    *logits_of*(ids, unconditional) gives [batch, length, V]; *draw*(shape) gives uniform numbers in [0, 1) (asked for
    only where the temperature is above 0) and fixes the device; *watch* sees the ids before each step.
    """
    start = torch.full((batch, length), mask_id, device=draw(torch.Size([0])).device)
    scheme = ByConfidence(start, mask_id, sampling, draw, watch)
    decode(scheme, lambda ids: scheme.guided(logits_of, ids))
    return scheme.ids
