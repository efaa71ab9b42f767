"""Attention with softplus in the place of the exponential, and a second stage that sharpens the weights (LSSA, LSSAR).

Gao and Spratling 2025, "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
arXiv:2501.13428. For a query that sees n keys,
    A = L1norm(softplus(log(n) q·k / sqrt(d))),   A' = L1norm(relu(n A - 1)^p),
so that the weights neither flatten nor sharpen as n grows. The second stage needs the whole row of weights: there is no
streaming kernel, and queries are taken in blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.attention import Attention, AttentionConfig
from zoo.nn.kernels import lift_heads, shared
from zoo.nn.layout import Layout

_ROWS = 256  # queries at once


@config
class SoftplusAttentionConfig(AttentionConfig):
    """Options of softplus attention; those of AttentionConfig besides.

    Attributes:
        power: p of the second stage; 0 leaves it out.
        keep_rows: queries that see at most so many keys are not sharpened by subtracting their mean weight.
        log_length: scale the logits by log(n), and by 1 without it.
    """

    power: float = 15.0
    keep_rows: int = 3
    log_length: bool = True


class SoftplusAttention(Attention):
    """Drop-in for Attention. x [B, L, D] -> [B, L, D].

    Raises:
        ConfigError: ALiBi, whose penalties softplus does not turn into factors.
    """

    Config = SoftplusAttentionConfig
    config: SoftplusAttentionConfig

    def __init__(self, d_model: int, config: SoftplusAttentionConfig, layer_index: int = 0) -> None:
        if config.alibi:
            raise ConfigError("softplus_attention cannot take alibi: give it rope, or no positions")
        super().__init__(d_model, config, layer_index)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        batch, length = q.shape[:2]
        seen = shared(layout, ("seen", batch, length, q.device), lambda: layout.dense(length, batch, q.device))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = lift_heads(k, self.heads), lift_heads(v, self.heads)
        parts = [
            self._mix(q[:, :, at : at + _ROWS], k, v, seen[:, None, at : at + _ROWS])
            for at in range(0, length, _ROWS)
        ]  # fmt: skip
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = lift_heads(k, self.heads).to(q.dtype), lift_heads(v, self.heads).to(q.dtype)
        seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
        return self._mix(q.transpose(1, 2), k, v, seen).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """q [B, H, n, d] over k, v [B, H, S, d] where seen [B or 1, 1, n or 1, S]."""
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(work) * self.scale) @ k.to(work).transpose(-1, -2)
            count = seen.sum(-1, keepdim=True)  # n
            if self.config.log_length:
                scores = scores * count.clamp_min(1).to(work).log()
            weights = _unit(F.softplus(scores).masked_fill(~seen, 0))
            if self.config.power:
                floor = (count > self.config.keep_rows).to(work)
                excess = F.relu(weights * count - floor)
                # divided by the largest, which cancels, so that the power stays within range
                excess = excess / excess.amax(-1, keepdim=True).clamp_min(1e-30)
                weights = _unit(excess**self.config.power)
            weights = F.dropout(weights, self.config.dropout, self.training)
            return (weights @ v.to(work)).to(q.dtype)


def _unit(weights: Tensor) -> Tensor:
    """Weights that sum to one; rows of zeros stay."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
