"""FFT long convolution: one operator with its own backward, for filters as long as the sequence.

    causal:     y[b, d, t] = sum_{j <= t} k[d, t - j] u[b, d, j] + skip[d] u[b, d, t]
    two-sided:  y[b, d, t] = sum_j k[d, (L - 1) + t - j] u[b, d, j] + skip[d] u[b, d, t]

It is a registered operator rather than autograd through `torch.fft`: PyTorch differentiates `rfft` by a full complex
transform of the zero-filled length, and keeps every spectrum alive. Here only u and k are saved, and their spectra
where these are small enough, which spares the backward pass two of its five transforms; on the CPU the channels go
through the cache block by block. The transforms themselves are in `zoo.nn.spectra`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.spectra import Plain, in_large_pages, is_short, run_tasks, spectra_for

BLOCK = 1 << 19  # points of all rings in one transform: with their spectra they fit a core's share of the cache
KEPT = 1 << 20  # points of all rings up to which the spectra are kept for the backward pass: 8 MB in float32
KEPT_SPLIT = 1 << 24  # the same for long signals on the CPU, where transforms cost more: 128 MB
LINE = 16  # float32 values in a cache line: channels-last input is gathered by that many channels at a time
TILE = 1 << 10  # positions of such a gathering


def long_conv(u: Tensor, k: Tensor, skip: Tensor | None = None, *, bidirectional: bool = False) -> Tensor:
    """Convolve every channel of *u* with its own filter of the same length.

    Transforms run in float32 (float64 for float64 input) whatever autocast says. Second derivatives are not provided.

    Args:
        u: [B, D, L] input of any strides (a transposed [B, L, D] costs no copy of the whole); the result has the
            same memory layout.
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
        raise ZooError(f"long_conv of input {tuple(u.shape)} needs filters of {taps} taps, got {tuple(k.shape)}")
    if skip is not None and skip.shape != u.shape[1:2]:
        raise ZooError(f"long_conv of input {tuple(u.shape)} needs skip [{u.shape[1]}], got {tuple(skip.shape)}")
    if torch.is_grad_enabled() and u.shape[0] * u.shape[1] * 2 * int(length) <= KEPT and is_short(length):
        if torch.compiler.is_compiling():
            return _kept(u, k, skip, bidirectional)[0]
        return _Kept.apply(u, k, skip, bidirectional)
    training = torch.is_grad_enabled() and (u.requires_grad or k.requires_grad)
    keep = training and u.device.type == "cpu" and u.shape[0] * u.shape[1] * 2 * int(length) <= KEPT_SPLIT
    return _long_conv(u, k, skip, bidirectional, keep)[0]


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


def _plan(u: Tensor) -> Plain:
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return spectra_for(int(u.shape[-1]), dtype, u.device.type == "cpu")


def _full_precision(x: Tensor) -> AbstractContextManager:
    kind = x.device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if active else nullcontext()


def _tasks(u: Tensor, plan: Plain) -> tuple[list[slice], int, int]:
    """Channels of each task; then how many channels and how many samples go through a transform together."""
    batch, width, _ = u.shape
    if u.device.type != "cpu":
        return [slice(0, width)], width, batch
    rows = max(1, BLOCK // plan.ring)
    samples = min(batch, rows)
    together = min(width, rows // samples)
    channels = min(width, max(together, LINE)) if _channels_last(u) else together
    return [slice(i, min(i + channels, width)) for i in range(0, width, channels)], together, samples


def _channels_last(u: Tensor) -> bool:
    return u.stride(1) == 1 and u.shape[1] > 1 and u.stride(2) != 1


def _stage(x: Tensor, plan: Plain) -> Tensor:
    """Signals of one task, gathered together when they lie channels-last."""
    if not _channels_last(x):
        return x
    out = x.new_empty(x.shape, dtype=plan.dtype)
    # In tiles whose lines stay in the first-level cache until every channel has taken its value: four times faster.
    for start in range(0, x.shape[-1], TILE):
        out[..., start : start + TILE] = x[..., start : start + TILE]
    return out


def _pieces(batch: int, width: int, channels: int, samples: int) -> list[tuple[slice, list[slice]]]:
    rows = [slice(b, min(b + samples, batch)) for b in range(0, batch, samples)]
    return [(slice(i, min(i + channels, width)), rows) for i in range(0, width, channels)]


def _of(k: Tensor, rows: slice, channels: slice) -> Tensor:
    return k[channels] if k.ndim == 2 else k[rows, channels]


def _adding_up(out: Tensor, plan: Plain) -> Tensor:
    """*out*, or room in full precision in its place where several slices add up."""
    return out if plan.parts == 1 or out.dtype == plan.dtype else torch.empty_like(out, dtype=plan.dtype)


def _within(spectra: Tensor, k: Tensor, rows: slice, block: slice, channels: slice) -> Tensor:
    return spectra[block][channels] if k.ndim == 2 else spectra[rows, block][:, channels]


@torch.library.custom_op("zoo::long_conv", mutates_args=())
def _long_conv(
    u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    plan, y = _plan(u), in_large_pages(torch.empty_like(u))
    signals, responses = (in_large_pages(kept) for kept in _room(u, k, plan, keep))
    tasks, together, samples = _tasks(u, plan)

    def task(block: slice) -> None:
        source = _stage(u[:, block], plan)
        target = torch.empty_like(source) if _channels_last(y) else y[:, block]
        filters, direct = k[..., block, :], None if skip is None else skip[block].to(plan.dtype)
        for channels, batches in _pieces(len(source), source.shape[1], together, samples):
            taps, shared = filters, dict[int, Tensor]()
            for rows in batches:
                if rows is batches[0] or k.ndim == 3:
                    taps, shared = plan.ready(_of(filters, rows, channels)), {}
                ready, into = plan.ready(source[rows, channels]), _adding_up(target[rows, channels], plan)
                for part in range(plan.parts):
                    spectrum = shared.get(part)
                    if spectrum is None:
                        spectrum = plan.spectrum(taps, None if direct is None else direct[channels], part=part)
                        if keep:
                            out = plan.slice(_within(responses, k, rows, block, channels), part)
                            torch.conj_physical(spectrum, out=out)
                        if k.ndim == 2 and len(batches) > 1:
                            shared[part] = spectrum
                    product = plan.spectrum(ready, part=part)
                    if keep:
                        torch.conj_physical(product, out=plan.slice(signals[rows, block][:, channels], part))
                    plan.signal(product.mul_(spectrum), into, part=part)
                if into.dtype != target.dtype:
                    target[rows, channels] = into
        if _channels_last(y):
            y[:, block] = target

    with _full_precision(u):
        run_tasks(task, tasks)
    return y, signals, responses


def _room(u: Tensor, k: Tensor, plan: Plain, keep: bool) -> tuple[Tensor, Tensor]:
    """Where the conjugate spectra of u and k go; empty where they are computed anew."""
    dtype = torch.complex128 if plan.dtype == torch.float64 else torch.complex64
    if not keep:
        return u.new_empty(0, dtype=dtype), u.new_empty(0, dtype=dtype)
    signals, responses = (u.new_empty(*x.shape[:-1], *plan.shape, dtype=dtype) for x in (u, k))
    return signals, responses


@_long_conv.register_fake
def _(u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u), *_room(u, k, _plan(u), keep)


@torch.library.custom_op("zoo::long_conv_backward", mutates_args=())
def _long_conv_backward(
    g: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    signals: Tensor,
    responses: Tensor,
    need_u: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor]:
    plan, kept = _plan(u), signals.numel() > 0
    du = in_large_pages(torch.empty_like(u)) if need_u else u.new_empty(0)
    dk = in_large_pages(torch.empty_like(k, memory_format=torch.contiguous_format)) if need_k else k.new_empty(0)
    tasks, together, samples = _tasks(u, plan)

    def task(block: slice) -> None:
        above, source = _stage(g[:, block], plan), _stage(u[:, block], plan) if need_k and not kept else u[:, block]
        target = torch.empty_like(above) if _channels_last(u) and need_u else du[:, block] if need_u else du
        filters, direct = k[..., block, :], None if skip is None else skip[block].to(plan.dtype)
        for channels, batches in _pieces(len(source), source.shape[1], together, samples):
            taps, shared, totals = filters, dict[int, Tensor](), dict[int, Tensor]()
            for rows in batches:
                ready = plan.ready(above[rows, channels])
                signal = plan.ready(source[rows, channels]) if need_k and not kept else None
                if need_u and not kept and (rows is batches[0] or k.ndim == 3):
                    taps, shared = plan.ready(_of(filters, rows, channels)), {}
                into = _adding_up(target[rows, channels], plan) if need_u else target
                lags = dk
                if need_k:
                    slot = dk[block][channels] if k.ndim == 2 else dk[rows, block][:, channels]
                    lags = _adding_up(slot, plan)
                for part in range(plan.parts):
                    arriving = plan.spectrum(ready, part=part)
                    if need_k:
                        if signal is None:
                            product = plan.slice(signals[rows, block][:, channels], part) * arriving
                        else:
                            product = plan.spectrum(signal, conj=True, part=part).mul_(arriving)
                        if k.ndim == 2:
                            product = product[0] if len(product) == 1 else product.sum(0)
                            product = product.add_(totals.pop(part)) if part in totals else product
                        if k.ndim == 2 and rows is not batches[-1]:
                            totals[part] = product
                        else:
                            plan.taps(product, lags, part=part)
                        del product
                    if need_u:
                        spectrum = shared.get(part)
                        if kept:
                            spectrum = plan.slice(_within(responses, k, rows, block, channels), part)
                        elif spectrum is None:
                            part_skip = None if direct is None else direct[channels]
                            spectrum = plan.spectrum(taps, part_skip, conj=True, part=part)
                            if k.ndim == 2 and len(batches) > 1:
                                shared[part] = spectrum
                        plan.signal(arriving.mul_(spectrum), into, part=part)
                if need_u and into.dtype != target.dtype:
                    target[rows, channels] = into
                if need_k and lags.dtype != dk.dtype and (k.ndim == 3 or rows is batches[-1]):
                    slot.copy_(lags)
        if _channels_last(u) and need_u:
            du[:, block] = target

    with _full_precision(u):
        run_tasks(task, tasks)
    return du, dk


@_long_conv_backward.register_fake
def _(
    g: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    signals: Tensor,
    responses: Tensor,
    need_u: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor]:
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else k.new_empty(0)
    return torch.empty_like(u) if need_u else u.new_empty(0), dk


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, k, skip, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, k, skip, *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None, None, None
    u, k, skip, signals, responses = ctx.saved_tensors
    need_u, need_k, need_skip, *_ = ctx.needs_input_grad
    du, dk = _long_conv_backward(g, u, k, skip, signals, responses, need_u, need_k or need_skip)
    # The direct path is one more tap at lag 0, hence so is its gradient.
    lag0 = dk[..., k.shape[-1] - u.shape[-1]].reshape(-1, u.shape[1]).sum(0).to(skip.dtype) if need_skip else None
    return du if need_u else None, dk if need_k else None, lag0, None, None


_long_conv.register_autograd(_backward, setup_context=_save)


def _keep(u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same for small work, where transforms cost more than memory: also gives the spectra of u and k."""
    plan, y = _plan(u), torch.empty_like(u)
    with _full_precision(u):
        signal = plan.spectrum(plan.ready(u))
        filters = plan.spectrum(plan.ready(k), None if skip is None else skip.to(plan.dtype))
        plan.signal(signal * filters, y)
    return y, signal, filters


_kept = torch.library.custom_op("zoo::long_conv_kept", _keep, mutates_args=())


@_kept.register_fake
def _(u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(u)
    dtype = torch.complex128 if plan.dtype == torch.float64 else torch.complex64
    signal, filters = ((*x.shape[:-1], *plan.shape) for x in (u, k))
    return torch.empty_like(u), u.new_empty(signal, dtype=dtype), u.new_empty(filters, dtype=dtype)


def _keep_backward(
    g: Tensor, signal: Tensor, filters: Tensor, taps: int, need_u: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    plan = _plan(g)
    with _full_precision(g):
        # Of the three spectra of a correlation this conjugates g's, and then the result's: with `Twisted` at no cost.
        arriving = plan.spectrum(plan.ready(g), conj=True)
        du, dk = g.new_empty(0), g.new_empty(0, dtype=plan.dtype)
        if need_k:
            product = signal * arriving
            if filters.ndim == 2:
                product = product[0] if len(product) == 1 else product.sum(0)
            dk = g.new_empty(*filters.shape[:-1], taps, dtype=plan.dtype)
            plan.taps(product, dk, conj=True)
        if need_u:
            du = torch.empty_like(g)
            plan.signal(arriving.mul_(filters), du, conj=True)
        return du, dk


_kept_backward = torch.library.custom_op("zoo::long_conv_kept_backward", _keep_backward, mutates_args=())


@_kept_backward.register_fake
def _(g: Tensor, signal: Tensor, filters: Tensor, taps: int, need_u: bool, need_k: bool) -> tuple[Tensor, Tensor]:
    dk = g.new_empty((*filters.shape[:-1], taps) if need_k else (0,), dtype=_plan(g).dtype)
    return torch.empty_like(g) if need_u else g.new_empty(0), dk


def _save_kept(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, k, skip, _ = inputs
    ctx.lag0, ctx.taps, ctx.dtypes = (
        k.shape[-1] - u.shape[-1],
        k.shape[-1],
        (k.dtype, None if skip is None else skip.dtype),
    )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward_kept(ctx: Any, g: Tensor | None, *_: None, run: Any = _kept_backward) -> tuple[Tensor | None, ...]:
    need_u, need_k, need_skip, _ = ctx.needs_input_grad
    if g is None:
        return None, None, None, None
    signal, filters = ctx.saved_tensors
    du, dk = run(g, signal, filters, ctx.taps, need_u, need_k or need_skip)
    lag0 = dk[..., ctx.lag0].reshape(-1, g.shape[1]).sum(0).to(ctx.dtypes[1]) if need_skip else None
    return du if need_u else None, dk.to(ctx.dtypes[0]) if need_k else None, lag0, None


_kept.register_autograd(_backward_kept, setup_context=_save_kept)


class _Kept(torch.autograd.Function):
    """The same without the dispatch of a registered operator, which at a thousand tokens is a tenth of the time."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, skip: Tensor | None, bidirectional: bool) -> Tensor:
        output = _keep(u, k, skip, bidirectional)
        _save_kept(ctx, (u, k, skip, bidirectional), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_kept(ctx, g, run=_keep_backward)
