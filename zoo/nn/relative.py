"""Attention whose mask depends on j - i alone: reach to either side, ALiBi, sliding windows.

Such a mask is a vector per head. Reversing the queries makes its L x L matrix a view of that vector with strides
(1, 1): the kernel reads it, and nothing is ever materialised. Windows are cut into blocks of queries, each over the
keys it can reach. Tensors are [B, H, L, d].
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.kernels import Slopes, sdpa
from zoo.nn.positions import slope_vector

_INF = float("inf")


@lru_cache(maxsize=32)
def _line(reach: tuple[int, int], slopes: Slopes | None, before: int, after: int, device: torch.device) -> Tensor:
    """Bias [H or 1, before + after + 1] of a key at distance -before .. after from its query; -inf out of reach."""
    with torch.inference_mode(False), torch.no_grad():
        delta = torch.arange(-before, after + 1, device=device, dtype=torch.float32)
        line = torch.zeros(1, len(delta), device=device)
        if slopes is not None:
            line = -delta.abs() * slope_vector(slopes, device)[:, None]
        return line.masked_fill((delta < -reach[0]) | (delta > reach[1]), -_INF)


def relative_mask(
    rows: int, keys: int, offset: int, reach: tuple[int, int], slopes: Slopes | None, like: Tensor
) -> Tensor:
    """Bias [1, H or 1, rows, keys] of queries offset .. offset + rows - 1 in *reversed* order over keys 0 .. keys - 1.

    A view of one vector per head: row r, key j reads element r + j.
    """
    before, after = offset + rows - 1, keys - 1 - offset
    # rounded up, so that batches of many lengths share few vectors
    wide_before, wide_after = (max(64, 1 << max(n, 1).bit_length()) for n in (before, after))
    line = _line.__wrapped__ if torch.compiler.is_compiling() else _line
    reach = (min(reach[0], wide_before), min(reach[1], wide_after))
    vector = line(reach, slopes, wide_before, wide_after, like.device).to(like.dtype)
    size = vector.shape[1]
    return vector.as_strided((1, len(vector), rows, keys), (0, size, 1, 1), wide_before - before)


def attend_relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: tuple[int, int],
    slopes: Slopes | None,
    scale: float,
    dropout: float,
    offset: int = 0,
) -> Tensor:
    """Queries offset, offset + 1, ... over keys 0, 1, ... within *reach* (left, right), with ALiBi where given."""
    mask = relative_mask(q.shape[2], k.shape[2], offset, reach, slopes, q)
    return sdpa(q.flip(2), k, v, mask, False, scale, dropout).flip(2)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    sinks: int,
    slopes: Slopes | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """A sliding window in blocks of queries, each over only the keys it can reach: O(L (window + block)) time."""
    batch, _, length, _ = q.shape
    left, right = min(window[0], length), min(window[1], length)
    block = window_block(left + right)
    first = -(-(left + sinks) // block) * block  # from here on no block reaches below key `sinks`
    count = (length - right - first) // block
    if count < 1:
        return _edge(q, k, v, (left, right), sinks, slopes, scale, dropout)
    last = first + count * block
    span = left + block + right
    parts = [
        _edge(q[:, :, :first], k[:, :, : first + right], v[:, :, : first + right], (left, right), sinks, slopes, scale,
              dropout)
    ]  # fmt: skip
    if not first:
        parts = []
    low, high = first - left, last + right
    # [B, H, n, span, d] views of overlapping blocks, then blocks beside the batch
    kb, vb = (t[:, :, low:high].unfold(2, span, block).transpose(-1, -2) for t in (k, v))
    qb = q[:, :, first:last].unflatten(2, (count, block))
    if sinks:
        kb, vb = (
            torch.cat([t[:, :, None, :sinks].expand(-1, -1, count, -1, -1), b], dim=3)
            for t, b in ((k, kb), (v, vb))
        )  # fmt: skip
    qb, kb, vb = (t.transpose(1, 2).flatten(0, 1) for t in (qb, kb, vb))  # [B n, H, block or span, d]
    mask = _block_mask(block, span, left, right, sinks, slopes, q.device, q.dtype)
    y = sdpa(qb, kb, vb, mask, False, scale, dropout)
    parts.append(y.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3))
    if last < length:
        start = last - left
        tail_q, tail_k, tail_v = q[:, :, last:], k[:, :, start:], v[:, :, start:]
        if sinks:
            tail_k, tail_v = (torch.cat([t[:, :, :sinks], b], dim=2) for t, b in ((k, tail_k), (v, tail_v)))
            rows, keys = length - last, length - start
            tail = reach_mask(rows, keys, left, (left, right), None, q.device)
            tail = F.pad(tail, (sinks, 0)).to(q.dtype)
            parts.append(sdpa(tail_q, tail_k, tail_v, tail, False, scale, dropout))
        else:
            parts.append(attend_relative(tail_q, tail_k, tail_v, (left, right), slopes, scale, dropout, offset=left))
    return torch.cat(parts, dim=2)


def window_block(window: int) -> int:
    """Queries a block: large enough to feed the matrix units, small enough to waste few keys beside the window."""
    return max(64, min(256, 1 << (max(window, 1) // 2).bit_length()))


def _edge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: tuple[int, int],
    sinks: int,
    slopes: Slopes | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Queries and keys that both start at token 0."""
    if not sinks:
        if slopes is None and reach[0] >= k.shape[2] and not reach[1] and q.shape[2] == k.shape[2]:
            return sdpa(q, k, v, None, True, scale, dropout)
        return attend_relative(q, k, v, reach, slopes, scale, dropout)
    mask = reach_mask(q.shape[2], k.shape[2], 0, reach, None, q.device)
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)[None]
    return sdpa(q, k, v, mask.masked_fill((key < sinks) & (key <= row), 0).to(q.dtype), False, scale, dropout)


def reach_mask(
    rows: int, keys: int, offset: int, reach: tuple[int, int], slopes: Slopes | None, device: torch.device
) -> Tensor:
    """[H or 1, rows, keys] float32 bias in the ordinary order of queries."""
    like = torch.empty(0, device=device)
    return relative_mask(rows, keys, offset, reach, slopes, like)[0].flip(1)


@lru_cache(maxsize=16)
def _kept_block_mask(
    block: int, span: int, left: int, right: int, sinks: int, slopes: Slopes | None, device: torch.device
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        mask = reach_mask(block, span, left, (left, right), slopes, device)
        return F.pad(mask, (sinks, 0)) if sinks else mask


def _block_mask(
    block: int,
    span: int,
    left: int,
    right: int,
    sinks: int,
    slopes: Slopes | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    build = _kept_block_mask.__wrapped__ if torch.compiler.is_compiling() else _kept_block_mask
    return build(block, span, left, right, sinks, slopes, device).to(dtype)
