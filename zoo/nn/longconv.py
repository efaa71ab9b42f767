"""FFT long convolution: one operator with its own backward, for filters as long as the sequence.

    causal:     y[b, d, t] = sum_{j <= t} k[d, t - j] u[b, d, j] + skip[d] u[b, d, t]
    two-sided:  y[b, d, t] = sum_j k[d, (L - 1) + t - j] u[b, d, j] + skip[d] u[b, d, t]

It is a registered operator rather than autograd through `torch.fft`: PyTorch differentiates `rfft` by a full complex
transform of the zero-filled length, and keeps every spectrum alive. Here only u and k are saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError


def long_conv(u: Tensor, k: Tensor, skip: Tensor | None = None, *, bidirectional: bool = False) -> Tensor:
    """Convolve every channel of *u* with its own filter of the same length.

    Transforms run in float32 (float64 for float64 input) whatever autocast says.

    Args:
        u: [B, D, L] input of any strides; the result has the same memory layout.
        k: [D, L] filters, or [B, D, L] filters of each sample. Two-sided filters hold the lags -(L-1) .. L-1 in that
            order, [D, 2L-1] or [B, D, 2L-1]; see `two_sided`.
        skip: [D] weight of the direct path, or None.
        bidirectional: *k* is two-sided.

    Returns:
        [B, D, L] in the dtype of *u*.

    Raises:
        ZooError: the shapes do not fit.
    """
    length = u.shape[-1]
    taps = 2 * length - 1 if bidirectional else length
    if u.ndim != 3 or k.shape[-2:] != (u.shape[1], taps) or (k.ndim == 3 and k.shape[0] != u.shape[0]):
        raise ZooError(
            f"long_conv of input {tuple(u.shape)} needs filters [{u.shape[-2]}, {taps}], got {tuple(k.shape)}"
        )
    if skip is not None and skip.shape != u.shape[1:2]:
        raise ZooError(f"long_conv of input {tuple(u.shape)} needs skip [{u.shape[1]}], got {tuple(skip.shape)}")
    return _long_conv(u, k, skip, bidirectional)


def two_sided(forward: Tensor, backward: Tensor) -> Tensor:
    """S4's bidirectional filter: *forward* [.., L] on the lags 0 .. L-1, *backward* [.., L] on the lags -1 .. -L.

    Lag -L never meets an input, so the last tap of *backward* is left out: the result is [.., 2L-1].
    """
    return torch.cat([backward[..., :-1].flip(-1), forward], dim=-1)


def long_conv_naive(u: Tensor, k: Tensor, skip: Tensor | None = None, *, bidirectional: bool = False) -> Tensor:
    """The same by a dense Toeplitz matrix, O(L^2): the oracle of the tests."""
    length = u.shape[-1]
    lag = torch.arange(length, device=u.device)[:, None] - torch.arange(length, device=u.device)
    if bidirectional:
        matrix = k[..., lag + length - 1]
    else:
        matrix = torch.where(lag >= 0, k[..., lag.clamp(min=0)], torch.zeros((), dtype=k.dtype, device=k.device))
    y = torch.einsum("...ts,b...s->b...t" if k.ndim == 2 else "b...ts,b...s->b...t", matrix, u)
    return y if skip is None else y + skip[:, None] * u


def _work_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _ring(length: int) -> int:
    """A transform length of at least 2L - 1 whose factors are 2, 3 and 5 with few of the odd ones."""
    need = max(2 * length - 1, 2)
    power = 1 << (need - 1).bit_length()
    return min(c for c in (power, power * 3 // 4, power * 5 // 8, power * 15 // 16) if c >= need and c % 2 == 0)


def _wrap(k: Tensor, n: int, bidirectional: bool) -> Tensor:
    """The filter laid on a ring of n: lag 0 first, negative lags at the end."""
    if not bidirectional:
        return k
    length = (k.shape[-1] + 1) // 2
    ring = k.new_zeros(*k.shape[:-1], n)
    ring[..., :length] = k[..., length - 1 :]
    ring[..., n - length + 1 :] = k[..., : length - 1]
    return ring


@torch.library.custom_op("zoo::long_conv", mutates_args=())
def _long_conv(u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> Tensor:
    n, length, work = _ring(u.shape[-1]), u.shape[-1], _work_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        spectrum = torch.fft.rfft(_wrap(k.to(work), n, bidirectional), n=n)
        spectrum = spectrum * torch.fft.rfft(u.to(work), n=n)
        y = torch.fft.irfft(spectrum, n=n)[..., :length]
        if skip is not None:
            y = y + skip.to(work)[:, None] * u
        return torch.empty_like(u).copy_(y)


@_long_conv.register_fake
def _(u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> Tensor:
    return torch.empty_like(u)


@torch.library.custom_op("zoo::long_conv_backward", mutates_args=())
def _long_conv_backward(
    g: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, length, work = _ring(u.shape[-1]), u.shape[-1], _work_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        kf = torch.fft.rfft(_wrap(k.to(work), n, bidirectional), n=n)
        gf = torch.fft.rfft(g.to(work), n=n)
        du = torch.fft.irfft(gf * kf.conj(), n=n)[..., :length]
        if skip is not None:
            du = du + skip.to(work)[:, None] * g
        kf = gf * torch.fft.rfft(u.to(work), n=n).conj()
        ring = torch.fft.irfft(kf.sum(0) if k.ndim == 2 else kf, n=n)
        if bidirectional:
            ring = torch.cat([ring[..., n - length + 1 :], ring[..., :length]], -1)
        dk = torch.empty_like(k, memory_format=torch.contiguous_format).copy_(ring[..., : k.shape[-1]])
        dskip = u.new_empty(0) if skip is None else torch.einsum("bdl,bdl->d", g.to(work), u.to(work)).to(skip.dtype)
        return torch.empty_like(u).copy_(du), dk, dskip


@_long_conv_backward.register_fake
def _(g: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    dskip = u.new_empty(0) if skip is None else torch.empty_like(skip)
    return torch.empty_like(u), torch.empty_like(k, memory_format=torch.contiguous_format), dskip


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    u, k, skip, ctx.bidirectional = inputs
    ctx.save_for_backward(u, k, skip)


def _backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    u, k, skip = ctx.saved_tensors
    du, dk, dskip = _long_conv_backward(g, u, k, skip, ctx.bidirectional)
    return du, dk, None if skip is None else dskip, None


_long_conv.register_autograd(_backward, setup_context=_save)
