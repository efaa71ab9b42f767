"""Depthwise causal convolution with a handful of taps, on channels-last sequences.

    y[b, t, c] = bias[c] + sum_{j < K} weight[c, 0, j] x[b, t - (K - 1) + j, c]

The weights are stored as `nn.Conv1d(C, C, K, groups=C)` stores them. Shifted multiply-adds over slices of L that stay
in the cache replace the library's grouped convolution, whose CPU backward costs several times more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ZooError
from zoo.nn.spectra import run_tasks

SLICE = 1 << 19  # elements of a task: 2 MB in float32; one task's operations are parallel themselves


def causal_short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, history: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own K taps, seeing only the present and the past.

    Args:
        x: [B, L, C].
        weight: [C, 1, K], last tap on the present input.
        bias: [C] or None.
        history: [B, K-1, C] inputs that came before *x* (see `short_conv_history`); None means zeros.

    Returns:
        [B, L, C] in the dtype of *x*.

    Raises:
        ZooError: the shapes do not fit.
    """
    taps = weight.shape[-1]
    if x.ndim != 3 or weight.shape != (x.shape[-1], 1, taps):
        raise ZooError(
            f"short convolution of {tuple(x.shape)} needs weights [{x.shape[-1]}, 1, K], got {tuple(weight.shape)}"
        )
    if history is not None and history.shape != (x.shape[0], taps - 1, x.shape[2]):
        raise ZooError(
            f"short convolution of {tuple(x.shape)} with {taps} taps got a history of {tuple(history.shape)}"
        )
    if torch.compiler.is_compiling():
        return _operator(x, weight, bias, history)
    return _ShortConv.apply(x, weight, bias, history)


def short_conv_history(x: Tensor, taps: int, history: Tensor | None = None) -> Tensor:
    """The last K-1 inputs [B, K-1, C] after *x* [B, L, C], given those before it: what continues the convolution."""
    if history is None:
        history = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    keep = taps - 1 - x.shape[1]
    if keep <= 0:
        return x[:, x.shape[1] - (taps - 1) :].contiguous()
    return torch.cat([history[:, history.shape[1] - keep :].to(x.dtype), x], dim=1)


def short_conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> tuple[Tensor, Tensor]:
    """One token: *x* [B, C] and *history* [B, K-1, C] to the output [B, C] and the next history."""
    window = torch.cat([history.to(x.dtype), x[:, None]], dim=1)  # [B, K, C]
    y = (window * weight[:, 0].t().to(x.dtype)).sum(1)
    return (y if bias is None else y + bias.to(x.dtype)), window[:, 1:]


def _slices(x: Tensor) -> list[tuple[slice, slice]]:
    """(samples, positions) of each task: several short samples, or a part of a long one."""
    batch, length, channels = x.shape
    if x.device.type != "cpu":
        return [(slice(0, batch), slice(0, length))]
    rows = max(1, min(length, SLICE // max(channels, 1)))
    samples = max(1, SLICE // max(length * channels, 1))
    return [
        (slice(b, min(b + samples, batch)), slice(start, min(start + rows, length)))
        for b in range(0, batch, samples)
        for start in range(0, length, rows)
    ]


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _window(x: Tensor, history: Tensor | None, span: slice, taps: int, work: torch.dtype) -> Tensor:
    """Inputs of samples [B, L, C] on *span* and K-1 before it, with their history (or zeros) before position 0."""
    start, stop = span.start, span.stop
    first = start - (taps - 1)
    if first >= 0:
        return x[:, first:stop].to(work)
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if history is None else history
    return torch.cat([past[:, taps - 1 + first :].to(work), x[:, max(first, 0) : stop].to(work)], dim=1)


def _short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    batch, length, channels = x.shape
    taps, work = weight.shape[-1], _work(x)
    rows = weight[:, 0].t().to(work).contiguous()  # [K, C]
    base = torch.zeros((), dtype=work, device=x.device) if bias is None else bias.to(work)
    y = x.new_empty(batch, length, channels)

    def task(item: tuple[slice, slice]) -> None:
        b, span = item
        size = span.stop - span.start
        window = _window(x[b], None if history is None else history[b], span, taps, work)
        out = y[b, span] if y.dtype == work else y.new_empty(y[b, span].shape, dtype=work)
        torch.addcmul(base, window[:, :size], rows[0], out=out)
        for j in range(1, taps):
            out.addcmul_(window[:, j : j + size], rows[j])
        if y.dtype != work:
            y[b, span] = out

    run_tasks(task, _slices(x))
    return y


_operator = torch.library.custom_op("zoo::short_conv", mutates_args=())(_short_conv)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _short_conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    taps, work = weight.shape[-1], _work(x)
    rows = weight[:, 0].t().to(work).contiguous()  # [K, C]
    dx, slices = x.new_empty(batch, length, channels), _slices(x)
    sums = torch.zeros(len(slices), taps + 1, channels, dtype=work, device=x.device)  # of each slice: taps, then bias

    def task(item: tuple[int, tuple[slice, slice]]) -> None:
        number, (b, span) = item
        size = span.stop - span.start
        window = _window(x[b], None if history is None else history[b], span, taps, work)
        ahead = g[b, span.start : min(span.stop + taps - 1, length)].to(work)  # gradients that these inputs reach
        out = dx[b, span] if dx.dtype == work else dx.new_empty(dx[b, span].shape, dtype=work)
        torch.mul(ahead[:, :size], rows[taps - 1], out=out)
        for j in range(taps - 1):
            reach = ahead[:, taps - 1 - j : taps - 1 - j + size]
            out[:, : reach.shape[1]].addcmul_(reach, rows[j])
        if dx.dtype != work:
            dx[b, span] = out
        product = torch.empty_like(ahead[:, :size])
        for j in range(taps):
            torch.sum(torch.mul(ahead[:, :size], window[:, j : j + size], out=product), (0, 1), out=sums[number, j])
        torch.sum(ahead[:, :size], (0, 1), out=sums[number, taps])

    run_tasks(task, list(enumerate(slices)))
    *drows, dbias = sums.sum(0).unbind()
    dhistory = torch.zeros(0 if history is None else batch, taps - 1, channels, dtype=work, device=x.device)
    if history is not None:
        for j in range(taps - 1):  # tap j carries history row i to output i - j
            reach = min(taps - 1 - j, length)
            dhistory[:, j : j + reach] += rows[j] * g[:, :reach].to(work)
    dweight = torch.stack(drows, dim=1)[:, None].to(weight.dtype)  # [C, 1, K]
    return dx, dweight, dbias.clone(), dhistory.to(x.dtype if history is None else history.dtype)


_operator_backward = torch.library.custom_op("zoo::short_conv_backward", mutates_args=())(_short_conv_backward)


@_operator_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    past = x.new_empty(0, weight.shape[-1] - 1, x.shape[2]) if history is None else history.new_empty(history.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2], dtype=_work(x)), past


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, history = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, history)


def _gradients(ctx: Any, run: Callable[..., tuple[Tensor, ...]], g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, history = ctx.saved_tensors
    dx, dweight, dbias, dhistory = run(g, x, weight, history)
    return (
        dx,
        dweight,
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None if history is None else dhistory,
    )


_operator.register_autograd(lambda ctx, g: _gradients(ctx, _operator_backward, g), setup_context=_save)


class _ShortConv(torch.autograd.Function):
    """The same without the dispatch of a registered operator, which at a thousand tokens costs as much as the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
        _save(ctx, (x, weight, bias, history), x)
        return _short_conv(x, weight, bias, history)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, _short_conv_backward, g)
