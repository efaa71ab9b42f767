"""Causal attention with weights 1 + s + s²/2, by chunks, with a backward pass of its own (BASED, arXiv:2402.18668).

With a one put before each query and key, t = q·k = 1 + s and the weight is (t² + 1) / 2: within a chunk it needs no
feature map. Between chunks the state holds sums of k_i k_j v over pairs i <= j. The pairs are laid out in blocks of
four rows, i = 4a .. 4a + 3 with j >= 4a, so that a block is one product of two slices whose last axis is time; pairs
within a block's square then stand twice, with half the weight. Autograd would keep features, scores and their squares;
here the backward pass keeps the inputs and the state before each chunk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 4
SPAN = 1024  # tokens whose features exist at once


def taylor_mix(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Causal sums of (1 + s + s²/2) v, s = q·k / sqrt(scale), from the state *sums* on.

    Args:
        q, k: [B, L, H, d].
        v: [B, L, H, w].
        sums: [B, H, F, w], F = 1 + d + d(d+1)/2 triangular features, as `taylor_features` orders them.
        scale: see above.
        chunk: tokens a chunk; changes the speed, not the result.

    Returns:
        [B, L, H, w] and the state after the last token.
    """
    length, width = q.shape[1], q.shape[-1]
    chunk = min(chunk, 1 << max(0, (length - 1).bit_length()))
    padding = -length % chunk
    if padding:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)) for t in (q, k, v))
    pairs, triangle = layout(width, q.device)
    first = sums[:, :, pairs[0]] * pairs[1].to(sums.dtype)[:, None]
    y, end = _Mix.apply(q, k, v, first, scale, chunk)
    return y[:, :length], end[:, :, triangle[0]] * triangle[1].to(end.dtype)[:, None]


def taylor_sums(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """sum_t features(k_t) v_t^T over all tokens: [B, L, H, d], [B, L, H, w] -> [B, H, F, w]."""
    _, triangle = layout(k.shape[-1], k.device)
    blocks = _Sums.apply(k, v, scale)
    return blocks[:, :, triangle[0]] * triangle[1].to(blocks.dtype)[:, None]


@lru_cache(maxsize=16)
def layout(width: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How block features and triangular ones come from each other: (source, factor) of each, for heads of *width*.

    Block features are products of [1, x]; triangular ones have squares divided by sqrt 2.
    """
    rows, columns = torch.tensor(_pairs(width)).T
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    place = torch.zeros(width + 1, width + 1, dtype=torch.long)  # of a pair in the triangular order
    i, j = torch.triu_indices(width, width) + 1
    place[0] = torch.arange(width + 1)
    place[i, j] = torch.arange(1 + width, 1 + width + len(i))
    square = (low == high) & (low > 0)
    source = place[low, high]
    first = torch.zeros(1 + width + len(i), dtype=torch.long)  # a block feature of each triangular one
    first[source] = torch.arange(len(source))
    factor = torch.ones(len(square), dtype=torch.float64).masked_fill(square, 2**0.5)
    backwards = (1 / factor[first]).to(device)
    return (source.to(device), factor.to(device)), (first.to(device), backwards)


@lru_cache(maxsize=16)
def weights(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[F', 1] of each block feature in the polynomial."""
    pairs = _pairs(width)
    twice = [0.5 if i > 0 and (i == j or (j, i) in pairs) else 1.0 for i, j in pairs]
    return torch.tensor(twice, dtype=dtype, device=device)[:, None]


def _blocks(width: int) -> list[tuple[int, int]]:
    """(first row, rows) of each block over the axis [1, x] of width + 1 places."""
    return [(0, 1), *((i, min(ROWS, width + 1 - i)) for i in range(1, width + 1, ROWS))]


def _pairs(width: int) -> list[tuple[int, int]]:
    return [(i, j) for row, many in _blocks(width) for i in range(row, row + many) for j in range(row, width + 1)]


def features(x: Tensor) -> Tensor:
    """x [m, 1 + d, T], its first row ones -> block features [m, F', T]."""
    many, width, length = x.shape
    if torch.compiler.is_compiling():
        return torch.cat([(x[:, i : i + n, None] * x[:, None, i:]).flatten(1, 2) for i, n in _blocks(width - 1)], 1)
    out, start = x.new_empty(many, len(_pairs(width - 1)), length), 0
    for i, n in _blocks(width - 1):
        stop = start + n * (width - i)
        torch.mul(x[:, i : i + n, None], x[:, None, i:], out=out[:, start:stop].view(many, n, width - i, length))
        start = stop
    return out


def features_backward(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Add to *out* [m, 1 + d, T] the gradient of x from that of its features [m, F', T], which is overwritten."""
    width, start = x.shape[1], 0
    for i, n in _blocks(width - 1):
        stop = start + n * (width - i)
        block = grad[:, start:stop].unflatten(1, (n, width - i))
        for row in range(n):
            out[:, i:].addcmul_(block[:, row], x[:, i + row, None])
        out[:, i : i + n] += block.mul_(x[:, None, i:]).sum(2)
        start = stop


def _rows_of(x: Tensor, chunk: int, scale: float) -> Tensor:
    """[B, L, H, d] -> [m, 1 + d, T], scaled, with ones; m runs over batch, chunks and heads."""
    batch, length, heads, width = x.shape
    x = x.view(batch, length // chunk, chunk, heads, width).permute(0, 1, 3, 4, 2)
    out = x.new_empty(batch, length // chunk, heads, width + 1, chunk)
    out[..., :1, :] = 1
    out[..., 1:, :] = x * scale**-0.25
    return out.flatten(0, 2)


def _unrows(x: Tensor, batch: int, heads: int, scale: float) -> Tensor:
    """The gradient's way back: [m, 1 + d, T] -> [B, L, H, d]."""
    x = x[:, 1:].unflatten(0, (batch, -1, heads)).permute(0, 1, 4, 2, 3) * scale**-0.25
    return x.flatten(1, 2)


def _columns(v: Tensor, chunk: int) -> Tensor:
    """[B, L, H, w] -> [m, T, w]"""
    return v.unflatten(1, (-1, chunk)).transpose(2, 3).flatten(0, 2)


def _uncolumns(v: Tensor, batch: int, heads: int) -> Tensor:
    return v.unflatten(0, (batch, -1, heads)).transpose(2, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """t [m, T, T] and the weights, lower triangles."""
    t = torch.bmm(q.transpose(1, 2), k)
    half = torch.full((), 0.5, dtype=t.dtype, device=t.device)
    return t, torch.addcmul(half, t, t, value=0.5).tril_()


class _Mix(torch.autograd.Function):
    """`taylor_mix` of whole chunks on block states, a span at a time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = q.shape
        step = max(chunk, SPAN // chunk * chunk)
        factor = weights(width, q.device, q.dtype)
        outputs, kept, now = [], [], first
        for start in range(0, length, step):
            here = slice(start, start + step)
            xq, xk, xv = (
                _rows_of(q[:, here], chunk, scale),
                _rows_of(k[:, here], chunk, scale),
                _columns(v[:, here], chunk),
            )
            y = torch.bmm(_scores(xq, xk)[1], xv)
            added = torch.bmm(features(xk), xv).view(batch, -1, *first.shape[1:])
            states = torch.cat([now[:, None], added], 1).cumsum(1)  # [B, n + 1, H, F', w]
            before = states[:, :-1].reshape(len(y), *first.shape[2:])
            y.baddbmm_(features(xq).transpose(1, 2), before * factor)
            now = states[:, -1]
            outputs.append(_uncolumns(y, batch, heads))
            kept.append(before)
        ctx.scale, ctx.chunk, ctx.step = scale, chunk, step
        ctx.save_for_backward(q, k, v, *kept)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), now.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, after: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        batch, length, heads, width = q.shape
        scale, chunk = ctx.scale, ctx.chunk
        factor = weights(width, q.device, q.dtype)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for start, before in reversed(list(zip(range(0, length, ctx.step), kept, strict=True))):
                here = slice(start, start + ctx.step)
                xq, xk = (_rows_of(t[:, here], chunk, scale) for t in (q, k))
                xv, g = _columns(v[:, here], chunk), _columns(dy[:, here], chunk)
                t, score = _scores(xq, xk)
                dxv = torch.bmm(score.transpose(1, 2), g)
                dt = torch.bmm(g, xv.transpose(1, 2)).mul_(t).tril_()
                dxq, dxk = torch.bmm(xk, dt.transpose(1, 2)), torch.bmm(xq, dt)
                local = torch.bmm(features(xq), g).mul_(factor).view(batch, -1, *after.shape[1:])
                later = torch.cat([local[:, 1:], after[:, None]], 1).flip(1).cumsum(1).flip(1)
                carried = later.reshape(len(g), *after.shape[2:])  # gradient of the state after each chunk
                after = later[:, 0] + local[:, 0]
                features_backward(xq, torch.bmm(before * factor, g.transpose(1, 2)), dxq)
                dxv.baddbmm_(features(xk).transpose(1, 2), carried)
                features_backward(xk, torch.bmm(carried, xv.transpose(1, 2)), dxk)
                dq[:, here], dk[:, here] = (_unrows(t, batch, heads, scale) for t in (dxq, dxk))
                dv[:, here] = _uncolumns(dxv, batch, heads)
        return dq, dk, dv, after, None, None


class _Sums(torch.autograd.Function):
    """`taylor_sums` on block states, a span at a time."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(k, v)
        total: Tensor | None = None
        for keys, values in zip(k.split(SPAN, 1), v.split(SPAN, 1), strict=True):
            size = keys.shape[1]
            part = torch.bmm(features(_rows_of(keys, size, scale)), _columns(values, size))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.unflatten(0, (k.shape[0], k.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_tensors
        batch, _, heads, _ = k.shape
        dk, dv = [], []
        g = g.flatten(0, 1)
        with torch.autocast(k.device.type, enabled=False):
            for keys, values in zip(k.split(SPAN, 1), v.split(SPAN, 1), strict=True):
                size = keys.shape[1]
                x, columns = _rows_of(keys, size, ctx.scale), _columns(values, size)
                dx = torch.zeros_like(x)
                dv.append(_uncolumns(torch.bmm(features(x).transpose(1, 2), g), batch, heads))
                features_backward(x, torch.bmm(g, columns.transpose(1, 2)), dx)
                dk.append(_unrows(dx, batch, heads, ctx.scale))
        return torch.cat(dk, 1), torch.cat(dv, 1), None
