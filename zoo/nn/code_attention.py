"""Attention of blocks of queries to near keys with a bias of distance and, by code, to all earlier ones (LongVQ)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def code_attention(
    q: Tensor, k: Tensor, v: Tensor, book: Tensor, mean: Tensor, counted: Tensor, distance: Tensor, first: Tensor
) -> Tensor:
    """softmax([q k / sqrt(dk) + bias, q book / sqrt(dk) + counted]) [v, mean], each query seeing what is not ahead.

    Args:
        q: [B, H, n, T, dk].
        k: [B, H, (n + 1) T, dk], a block before these ones first.
        v: [B, H, (n + 1) T, dv].
        book: [H, S, dk] codes.
        mean: [B, H, n, S, dv] values of each code.
        counted: [B, H, n, S] logarithm of their number; no gradient.
        distance: [H, 2T] bias of each distance.
        first: [B] bool, the first block has none before it.

    Returns:
        [B, H, n, T, dv].
    """
    return _CodeAttention.apply(q, k, v, book, mean, counted, distance, first)


def _table(distance: Tensor, size: int) -> Tensor:
    """Bias [H, T, 2T]: distance T + i - j of query i and key j; -inf ahead."""
    ahead = distance.new_full((len(distance), size - 1), -math.inf)
    line = torch.cat([distance.flip(-1), ahead], dim=-1)  # entry j - i + T - 1
    return line.unfold(1, 2 * size, 1).flip(1)


def _along_distance(table: Tensor) -> Tensor:
    """Sums [H, 2T] of a table's entries of equal distance."""
    heads, size, _ = table.shape
    # rows one longer than they are counted slide by one place each, which puts equal distances in columns
    sheared = torch.nn.functional.pad(table.flip(1), (0, size)).flatten(1)[:, : size * (3 * size - 1)]
    return sheared.view(heads, size, 3 * size - 1).sum(1)[:, : 2 * size].flip(-1)


def _paired(t: Tensor, size: int) -> Tensor:
    """[B, H, (n + 1) T, d] -> each block behind the one before it, [B H n, 2T, d]."""
    return t.unfold(2, 2 * size, size).transpose(-1, -2).flatten(0, 2)


def _unpaired(t: Tensor) -> Tensor:
    """The way back of gradients: [B, H, n, 2T, d] -> [B, H, (n + 1) T, d]."""
    before, own = t.chunk(2, dim=3)
    out = torch.nn.functional.pad(before.flatten(2, 3), (0, 0, 0, before.shape[3]))
    out[:, :, before.shape[3] :] += own.flatten(2, 3)
    return out


def _side_by_side(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """x [m, T, d] times near [m, d, 2T] and far [m, d, S] in one buffer [m, T, 2T + S]."""
    if torch.compiler.is_compiling():
        return torch.cat([torch.bmm(x, near), torch.bmm(x, far)], dim=-1)
    out, edge = x.new_empty(*x.shape[:2], near.shape[2] + far.shape[2]), near.shape[2]
    torch.bmm(x, near, out=out[..., :edge])
    torch.bmm(x, far, out=out[..., edge:])
    return out


class _CodeAttention(torch.autograd.Function):
    """Scores of both kinds lie in one buffer; the backward pass keeps their softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        book: Tensor,
        mean: Tensor,
        counted: Tensor,
        distance: Tensor,
        first: Tensor,
    ) -> Tensor:
        lead, (size, width), codes = q.shape[:3], q.shape[3:], book.shape[1]
        near = 2 * size
        q, mean = ((q * width**-0.5).flatten(0, 2), mean.reshape(-1, *mean.shape[3:]))
        k, v = (_paired(t, size) for t in (k, v))
        books = book[None, :, None].expand(*lead, codes, width).reshape(-1, codes, width)
        scores = _side_by_side(q, k.transpose(1, 2), books.transpose(1, 2))
        by_head = scores.view(*lead, size, near + codes)
        by_head[..., :near] += _table(distance, size)[:, None]
        by_head[..., near:] += counted[..., None, :]
        by_head[:, :, 0, :, :size].masked_fill_(first[:, None, None, None], -math.inf)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, books, mean, weights)
        ctx.lead = lead
        y = torch.bmm(weights[..., :near], v).baddbmm_(weights[..., near:], mean)
        return y.view(*lead, size, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, books, mean, weights = ctx.saved_tensors
        lead, near, width = ctx.lead, k.shape[1], q.shape[2]
        apart = lambda t: t.view(*lead, *t.shape[1:])
        with torch.autocast(g.device.type, enabled=False):
            g = g.reshape(len(q), *g.shape[3:])
            dscores = _side_by_side(g, v.transpose(1, 2), mean.transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data(dscores, weights, -1, weights.dtype)
            close, far = dscores[..., :near], dscores[..., near:]
            dq = torch.bmm(close, k).baddbmm_(far, books).mul_(width**-0.5)
            dk, dbook = torch.bmm(close.transpose(1, 2), q), torch.bmm(far.transpose(1, 2), q)
            dv = torch.bmm(weights[..., :near].transpose(1, 2), g)
            dmean = torch.bmm(weights[..., near:].transpose(1, 2), g)
            dk, dv = (_unpaired(apart(t)) for t in (dk, dv))
            ddistance = _along_distance(apart(close).sum((0, 2)))
        return apart(dq), dk, dv, apart(dbook).sum((0, 2)), apart(dmean), None, ddistance, None
