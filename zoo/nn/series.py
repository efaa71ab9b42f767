"""Power series modulo x^L: the inverse 1 / (1 - x h(x)), by Newton's iteration, with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.nn.longconv import long_conv


def feedback(h: Tensor) -> Tensor:
    """Coefficients [D, L] of 1 / (1 - x h(x)) mod x^L for h [D, L] (its last coefficient does not matter)."""
    return _Feedback.apply(h)


def _newton(a: Tensor) -> Tensor:
    """1 / a mod x^L for a [D, L] with a_0 = 1.

    From n right coefficients j come 2n: j - j (a j - 1). Products are cyclic of length 2n; what wraps round falls on
    coefficients that are known.
    """
    length = a.shape[-1]
    j = torch.ones_like(a[:, :1])
    while (n := j.shape[-1]) < length:
        spectrum = torch.fft.rfft(j, n=2 * n)
        error = torch.fft.irfft(spectrum * torch.fft.rfft(a[:, : 2 * n], n=2 * n), n=2 * n)[:, n:]
        change = torch.fft.irfft(spectrum * torch.fft.rfft(error, n=2 * n), n=2 * n)[:, :n]
        j = torch.cat([j, -change], dim=-1)
    return j[:, :length]


class _Feedback(torch.autograd.Function):
    """d(1/a) = -da / a²."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        a = torch.cat([torch.ones_like(h[:, :1]), -h[:, :-1]], dim=-1)
        j = _newton(a)
        ctx.save_for_backward(j)
        return j

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (j,) = ctx.saved_tensors
        back = long_conv(long_conv(g.flip(-1)[None], j), j)[0]  # g correlated with 1/a twice, in reversed time
        return torch.nn.functional.pad(back.flip(-1)[:, 1:], (0, 1))
