"""Power series modulo x^L, and the kernel of a state space closed into a loop, with a backward pass of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.nn.spectra import ring_size, run_tasks

FEW = 32  # coefficients of an inverse that are substituted: transforms so short cost more than they do
POINTS = 1 << 18  # of all rings of a block of channels: they and their spectra stay in a core's cache


def closed_loop(sums: Tensor, outputs: int) -> Tensor:
    """e_k + x g_k f / (1 - x h) modulo x^L for the series [e_1 .., g_1 .., f, h] = *sums* [2K + 2, D, L].

    Returns:
        [K, D, L], K = *outputs*.
    """
    return _ClosedLoop.apply(sums, outputs)


def _inverse(a: Tensor, terms: int) -> Tensor:
    """1 / a mod x^terms (a power of two) for a [D, L] with a_0 = 1: the first few by substitution, then Newton's way.

    From n right coefficients j come 2n: j - j (a j - 1). Products are cyclic of length 2n; what wraps round falls on
    coefficients that are known.
    """
    few = min(terms, FEW)
    padded = torch.nn.functional.pad(a[:, :few], (few - 1, 0))
    matrix = padded.unfold(1, few, 1).flip(2)  # [D, n, n], row i: a_i, a_(i - 1), .. and zeros above the diagonal
    unit = torch.zeros_like(padded[:, :few, None])
    unit[:, 0] = 1
    j = torch.linalg.solve_triangular(matrix, unit, upper=False)[..., 0]
    while (n := j.shape[-1]) < terms:
        spectrum = torch.fft.rfft(j, n=2 * n)
        error = torch.fft.irfft(spectrum * torch.fft.rfft(a[:, : 2 * n], n=2 * n), n=2 * n)[:, n:]
        change = torch.fft.irfft(torch.fft.rfft(error, n=2 * n).mul_(spectrum), n=2 * n)[:, :n]
        j = torch.cat([j, change.neg_()], dim=-1)
    return j


@dataclass
class _Divisor:
    """a [D, L] ready to be divided by: spectra of a and of the first half of 1 / a on a ring of 2 *half* >= L."""

    half: int
    whole: Tensor
    inverse: Tensor

    @staticmethod
    def of(a: Tensor) -> _Divisor:
        half = 1 << max(0, (a.shape[-1] - 1).bit_length() - 1)
        return _Divisor(half, torch.fft.rfft(a, n=2 * half), torch.fft.rfft(_inverse(a, half), n=2 * half))

    def divide(self, f: Tensor) -> Tensor:
        """f / a mod x^L: the first half by the inverse, the second from what it leaves of f (Karp and Markstein)."""
        half, ring, length = self.half, 2 * self.half, f.shape[-1]
        out = f.new_zeros(f.shape[0], ring)
        spectrum = torch.fft.rfft(f[:, :half], n=ring).mul_(self.inverse)
        out[:, :half] = torch.fft.irfft(spectrum, n=ring)[:, :half]
        rest = torch.fft.irfft(torch.fft.rfft(out, n=ring).mul_(self.whole), n=ring)[:, half:length]
        spectrum = torch.fft.rfft(f[:, half:] - rest, n=ring).mul_(self.inverse)
        out[:, half:] = torch.fft.irfft(spectrum, n=ring)[:, :half]
        return out[:, :length]


def _blocks(channels: int, ring: int) -> list[slice]:
    size = max(1, POINTS // ring)
    return [slice(i, min(i + size, channels)) for i in range(0, channels, size)]


def _over(task: Any, items: list[slice]) -> None:
    if torch.compiler.is_compiling():
        for item in items:
            task(item)
    else:
        run_tasks(task, items)


class _ClosedLoop(torch.autograd.Function):
    """`closed_loop`, a block of channels at a time; the backward pass keeps spectra of L and 2 L points."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, outputs: int) -> Tensor:
        _, channels, length = sums.shape
        ring = ring_size(max(2 * length - 1, 2))
        out = sums[:outputs].clone(memory_format=torch.contiguous_format)
        blocks = _blocks(channels, ring)
        kept: list[Any] = [None] * len(blocks)
        leaving, driven, loop = sums[outputs : 2 * outputs], sums[-2], sums[-1]

        def task(block: slice) -> None:
            a = torch.cat([torch.ones_like(loop[block, :1]), -loop[block, :-1]], dim=-1)
            divisor = _Divisor.of(a)
            inside = torch.fft.rfft(divisor.divide(driven[block]), n=ring)
            exits = torch.fft.rfft(leaving[:, block], n=ring)
            turns = torch.fft.irfft(exits * inside, n=ring)
            out[:, block, 1:] += turns[..., : length - 1]
            kept[blocks.index(block)] = (divisor.whole, divisor.inverse, inside, exits)

        _over(task, blocks)
        ctx.sizes = (outputs, length, ring, blocks)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*(t for parts in kept for t in parts))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        outputs, length, ring, blocks = ctx.sizes
        kept = ctx.saved_tensors
        out = torch.empty(2 * outputs + 2, *g.shape[1:], dtype=g.dtype, device=g.device)
        out[:outputs] = g
        half = 1 << max(0, (length - 1).bit_length() - 1)

        def task(block: slice) -> None:
            i = 4 * blocks.index(block)
            whole, inverse, inside, exits = kept[i : i + 4]
            arriving = torch.fft.rfft(g[:, block, 1:], n=ring)
            inside = inside.conj_physical()
            out[outputs : 2 * outputs, block] = torch.fft.irfft(arriving * inside, n=ring)[..., :length]
            within = arriving.mul_(exits.conj_physical())
            within = within[0] if outputs == 1 else within.sum(0)
            within = torch.fft.irfft(within, n=ring)[:, :length]
            # the transpose of a division is the same division in reversed time
            driven = _Divisor(half, whole, inverse).divide(within.flip(-1)).flip(-1)
            out[-2, block] = driven
            looped = torch.fft.irfft(torch.fft.rfft(driven, n=ring).mul_(inside), n=ring)
            out[-1, block, :-1] = looped[:, 1:length]
            out[-1, block, -1] = 0

        _over(task, blocks)
        return out, None
