"""Normalisation layers by name."""

from __future__ import annotations

from torch import nn

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """`layernorm` or `rmsnorm` over the last axis of width *width*."""
    return NORMS[kind](width, eps=eps)
