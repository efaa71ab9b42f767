"""Normalisation layers by name, and Mamba-2's gated norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """`layernorm` or `rmsnorm` over the last axis of width *width*."""
    return NORMS[kind](width, eps=eps)


def rms_unit(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last axis: RMSNorm without weights."""
    return _RMSUnit.apply(x, eps)


class _RMSUnit(torch.autograd.Function):
    """Two passes over x, and four in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        unit, scale = ctx.saved_tensors
        mean = (g * unit).mean(-1, keepdim=True)
        return torch.addcmul(g, unit, mean, value=-1).mul_(scale), None


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm(y · SiLU(gate)) · weight over each of *groups* equal parts of the last axis; all [..., D], weight [D]."""
    return _GatedNorm.apply(y, gate, weight, groups, eps)


class _GatedNorm(torch.autograd.Function):
    """Keeps y and the gate and makes the rest again: autograd would keep five tensors of their size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        product = F.silu(gate).mul_(y).unflatten(-1, (groups, -1))  # [..., G, W]
        norm = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        scale = norm.square_().div_(product.shape[-1]).add_(eps).rsqrt_()
        ctx.groups = groups
        ctx.save_for_backward(y, gate, weight, scale)
        return product.mul_(scale).flatten(-2).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, scale = ctx.saved_tensors
        parts = (ctx.groups, -1)
        with torch.autocast(y.device.type, enabled=False):
            silu = F.silu(gate)
            unit = (silu * y).unflatten(-1, parts).mul_(scale)
            along = g * unit.flatten(-2)
            dweight = along.flatten(0, -2).sum(0)
            mean = along.mul_(weight).unflatten(-1, parts).mean(-1, keepdim=True)
            down = (g * weight).unflatten(-1, parts).addcmul_(unit, mean, value=-1).mul_(scale).flatten(-2)
            dgate = torch.ops.aten.silu_backward(down * y, gate)
            return down.mul_(silu), dgate, dweight, None, None
