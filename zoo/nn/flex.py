"""Layouts for FlexAttention, which skips the blocks that a mask leaves empty; on CPU it has no backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zoo.nn.kernels import Slopes, lift_heads, shared
from zoo.nn.layout import Layout


def mask_mod(layout: Layout, batch: int, length: int, device: torch.device) -> Callable[..., Tensor]:
    """The layout as FlexAttention's predicate (b, h, query, key) -> bool. Draft trees have none."""
    block = layout.block.expand(batch, length) if layout.block is not None else None
    segment = layout.segment.expand(batch, length) if layout.segment is not None else None
    prefix = torch.as_tensor(layout.prefix if layout.prefix is not None else 0, device=device).expand(batch)
    left, right = layout.window or (0, 0)
    rank = layout.ranks(batch, length, device) if layout.kind == "window" else None

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if layout.kind == "causal":
            yes = k <= q
        elif layout.kind == "prefix":
            yes = (k <= q) | (k < prefix[b])
        elif layout.kind == "block_causal":
            assert block is not None
            yes = block[b, k] <= block[b, q]
        elif layout.kind == "window":
            assert rank is not None
            step = rank[b, k] - rank[b, q]
            yes = ((step >= -left) & (step <= right)) | ((rank[b, k] < layout.sinks) & (k <= q))
        else:
            yes = k >= 0
        if segment is not None:
            yes = yes & (segment[b, k] == segment[b, q])
        if layout.valid is not None:
            yes = yes & layout.valid[b, k]
        return yes

    return seen


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None = None) -> Tensor:
    """The same by FlexAttention, which skips blocks that the mask leaves empty; on CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, length, heads, _ = q.shape
    block_mask = shared(
        layout,
        ("flex", batch, length, q.device),
        lambda: create_block_mask(
            mask_mod(layout, batch, length, q.device), batch, None, length, length, device=str(q.device)
        ),
    )
    score_mod = None
    if slopes is not None:
        slope = torch.tensor(slopes, device=q.device)
        place = shared(
            layout,
            ("place", batch, length, q.device),
            lambda: layout.with_(position=None).positions(batch, length, q.device).expand(batch, length).contiguous(),
        )

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slope[h] * (place[b, i] - place[b, j]).abs()

    run = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = lift_heads(k, heads), lift_heads(v, heads)
    y = run(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
    return y.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
