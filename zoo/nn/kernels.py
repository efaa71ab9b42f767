"""What every lowering of a layout ends in: one SDPA call, and work that the layers of a forward pass share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.layout import Layout

T = TypeVar("T")
Slopes = tuple[float, ...]


@lru_cache(maxsize=1)
def steady_heap() -> None:
    """Teach glibc, once a process, to serve blocks up to 31 MB from its heap and to keep the heap's free end.

    One freed block of that size does it. Otherwise the larger temporaries of every forward and backward pass arrive in
    fresh pages, and the kernel's clearing them is a fifth of a training step.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def shared(layout: Layout, key: Any, build: Callable[[], T], *depends: Any) -> T:
    """*build()*, computed once for all layers that get this layout; again when an object of *depends* is another."""
    if torch.compiler.is_compiling():
        return build()
    memo = layout.__dict__.setdefault("_memo", {})  # dies with the layout; no field, so equality ignores it
    if key in memo and len(memo[key][0]) == len(depends) and all(a is b for a, b in zip(memo[key][0], depends)):  # noqa: B905
        return memo[key][1]
    with torch.inference_mode(False), torch.no_grad():
        value = build()
    memo[key] = (depends, value)
    return value


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    """SDPA on [B, H, L, d]; k and v may have fewer heads, and v another width (padded: the fast kernel wants one)."""
    k, v = lift_heads(k, q.shape[1]), lift_heads(v, q.shape[1])
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    elif width > q.shape[-1]:
        q, k = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout)
    return y[..., :width] if y.shape[-1] != width else y


def lift_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of x [B, H, L, d] so that there are *heads* (grouped queries)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
