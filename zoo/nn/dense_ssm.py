"""Dense state spaces: convolution kernels by powers of a real matrix, and the recurrence a block at a time.

A^(iT+j) = A^(iT) A^j, on a grid of about sqrt(L) x sqrt(L) as in `zoo.nn.ssm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.nn.rows import right_align
from zoo.nn.ssm import grid


def dense_powers(a: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[v, A v, A² v, ...] [..., H, N, count'] and A^count' for a [H, N, N], v [..., H, N].

    count' is the power of two at or above *count*.
    """
    columns, power = v[..., None], a
    while columns.shape[-1] < count:
        columns = torch.cat([columns, power @ columns], dim=-1)
        power = power @ power
    return columns, power


def dense_kernel(less: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """C A^t B for t = 0 .. length-1, in the precision given: A - I = *less* [H, N, N], b [H, N], c [K, H, N].

    Powers are kept less the identity, E of A^n giving 2 E + E E of A^2n: steps near the identity lose no digits.

    Returns:
        [K, H, length].
    """
    return _DenseKernel.apply(less, b, c, length)


Tape = list[tuple[Tensor, Tensor]]


def _double(less: Tensor, columns: Tensor, levels: int, end: bool) -> tuple[Tensor, Tensor, Tape]:
    """[v, A v, .., A^(n-1) v] for n = 2^levels and, where *end*, A^n - I, from A - I [H, N, N] and v [H, N, K].

    The last list is what `_undouble` needs: of each level A^m - I, and what it was applied to.
    """
    tape: Tape = []
    for level in range(levels):
        many, square = columns.shape[-1], end or level < levels - 1
        both = torch.cat([columns, less], dim=-1) if square else columns
        moved = torch.baddbmm(both, less, both)
        tape.append((less, both))
        if square:
            less = less + moved[..., many:]
        columns = torch.cat([columns, moved[..., :many]], dim=-1)
    return columns, less, tape


def _undouble(tape: Tape, dcolumns: Tensor, dless: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_double`'s matrix and columns from those of its results."""
    for less, both in reversed(tape):
        many = dcolumns.shape[-1] // 2
        square = both.shape[-1] > many
        dmoved = torch.cat([dcolumns[..., many:], dless], dim=-1) if square else dcolumns[..., many:]
        dboth = torch.baddbmm(dmoved, less.transpose(1, 2), dmoved)
        dcolumns = dcolumns[..., :many] + dboth[..., :many]
        dless = torch.baddbmm(dless + dboth[..., many:] if square else dless, dmoved, both.transpose(1, 2))
    return dless, dcolumns


class _DenseKernel(torch.autograd.Function):
    """`dense_kernel`: columns A^t B for a block of t, rows C A^(iT) for all blocks, and their product."""

    @staticmethod
    def forward(ctx: Any, less: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
        outer, inner = grid(length)
        columns, turn, fine = _double(less, b[..., None], (inner - 1).bit_length(), True)  # [H, N, T]
        first = c.permute(1, 2, 0)  # [H, N, K]
        rows, _, coarse = _double(turn.transpose(1, 2), first, (outer - 1).bit_length(), False)  # [H, N, I K]
        ctx.sizes = (len(c), length, len(fine))
        ctx.save_for_backward(columns, rows, *(t for pair in [*fine, *coarse] for t in pair))
        y = torch.bmm(rows[..., : outer * len(c)].transpose(1, 2), columns)  # [H, I K, T]
        return y.unflatten(1, (outer, len(c))).permute(2, 0, 1, 3).flatten(-2)[..., :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        many, length, levels = ctx.sizes
        columns, rows, *flat = ctx.saved_tensors
        tapes = list(zip(flat[::2], flat[1::2], strict=True))
        inner = columns.shape[-1]
        with torch.autocast(g.device.type, enabled=False):
            g = nn.functional.pad(g, (0, rows.shape[-1] // many * inner - length))
            g = g.unflatten(-1, (-1, inner)).permute(1, 2, 0, 3).flatten(1, 2)  # [H, I K, T]
            drows, dcolumns = torch.bmm(columns, g.transpose(1, 2)), torch.bmm(rows, g)
            none = torch.zeros_like(columns[..., :1]).expand(-1, -1, columns.shape[1])
            dturn, dc = _undouble(tapes[levels:], drows, none)
            dless, db = _undouble(tapes[:levels], dcolumns, dturn.transpose(1, 2))
        return dless, db[..., 0], dc.permute(2, 0, 1), None


def dense_scan(
    a: Tensor, b: Tensor, c: Tensor, u: Tensor, h: Tensor, count: Tensor | None, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Continue a dense state space over u [B, H, L] from h [B, H, N], a block at a time; c is [K, H, N].

    Returns:
        y [B, K, H, L] and the state after the first `count` places of each row (all, if None).
    """
    batch, _, length = u.shape
    block = min(block, 1 << max(0, (length - 1).bit_length()))
    columns, power = dense_powers(a, b, block)  # [H, N, T], A^T
    kernel = torch.einsum("khn,hnt->kht", c, columns)
    lag = torch.arange(block, device=u.device)
    lag = lag[:, None] - lag
    zero = torch.zeros((), dtype=u.dtype, device=u.device)
    toeplitz = torch.where(lag >= 0, kernel[..., lag.clamp_min(0)], zero)  # [K, H, T, T]
    reach, _ = dense_powers(a.transpose(1, 2), torch.einsum("khn,hnm->khm", c, a), block)  # [K, H, N, T]: C A^(t+1)
    taken = columns.flip(-1)  # [H, N, T]: A^(T-1-t) B

    def advance(part: Tensor, state: Tensor) -> Tensor:
        return torch.einsum("hmn,bhn->bhm", power, state) + torch.einsum("hnt,bht->bhn", taken, part)

    padding = -length % block
    outputs, state = [], h
    for part in nn.functional.pad(u, (0, padding)).split(block, dim=-1):
        outputs.append(torch.einsum("khts,bhs->bkht", toeplitz, part) + torch.einsum("khnt,bhn->bkht", reach, state))
        state = advance(part, state)
    y = torch.cat(outputs, dim=-1)[..., :length]
    if count is None and padding == 0:
        return y, state
    # zeros before the real inputs leave an empty state empty; what the old state becomes is added apart
    end = torch.zeros_like(h)
    for part in nn.functional.pad(right_align(u, count), (padding, 0)).split(block, dim=-1):
        end = advance(part, end)
    tokens = torch.full((batch,), length, device=u.device) if count is None else count
    square = a
    for bit in range(length.bit_length()):
        moved = torch.einsum("hmn,bhn->bhm", square, h)
        h = torch.where((tokens >> bit & 1).bool()[:, None, None], moved, h)
        square = square @ square
    return y, end + h
