"""Pointwise parts of a block in pieces along a long sequence, recomputed in the backward pass instead of kept.

The wide inner tensors of a block (four widths in a feed-forward network, three in Hyena's projections) are most of its
memory, and at a hundred thousand tokens and more fetching fresh pages for them costs as much time as the products
themselves. In pieces they never exist as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zoo.nn.spectra import run_tasks

PIECE = 1 << 21  # elements of the widest tensor of a piece: 8 MB in float32 stay in the last cache of a CPU
WHOLE = 1 << 24  # up to so many elements the widest tensor is made and kept as a whole
ACCELERATOR = 16  # both are so many times larger where caches do not matter and launches do
_local = threading.local()

# fn(context, *pieces) -> outputs; `context` leading rows of the pieces lie before the rows that are asked for
PieceFn = Callable[..., tuple[Tensor, ...]]


def in_pieces(
    fn: PieceFn, inputs: Sequence[Tensor], params: Sequence[nn.Parameter | None], width: int, halo: int = 0
) -> tuple[Tensor, ...]:
    """Evaluate *fn* on pieces of *inputs* along batch and length, and join its outputs.

    Args:
        fn: `fn(context, *pieces)` maps pieces [b, context + l, C] to a tuple of [b, l, C']; it must be causal with a
            reach of at most *halo* rows and draw no random numbers.
        inputs: tensors [B, L, C].
        params: every parameter *fn* uses (None entries are passed over).
        width: channels of the widest tensor inside *fn*.
        halo: rows before a piece that it needs to see; fewer are given at the start of the sequence.

    Returns:
        The outputs over all rows, each [B, L, C'].
    """
    batch, length = inputs[0].shape[:2]
    scale = 1 if inputs[0].device.type == "cpu" else ACCELERATOR
    if batch * length * width <= WHOLE * scale:
        return fn(0, *inputs)
    rows = max(halo, PIECE * scale // width, 1)
    if length <= rows:
        step = max(1, rows // length)
        spans = [(b, min(b + step, batch), 0, length) for b in range(0, batch, step)]
    else:
        spans = [(b, b + 1, start, min(start + rows, length)) for b in range(batch) for start in range(0, length, rows)]
    used = [p for p in params if p is not None]
    if not torch.is_grad_enabled():
        return _evaluate(fn, spans, halo, inputs)
    return _InPieces.apply(fn, spans, halo, len(inputs), *inputs, *used)


def last_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` as the last step of a piece: nothing reads its value when the piece is recomputed."""
    plain = type(layer) is nn.Linear  # an adapter beside it has gradients of its own
    return _Unread.apply(x, layer.weight, layer.bias) if plain and recomputing() else layer(x)


def recomputing() -> bool:
    """Whether this thread is in the backward pass of a piece, whose forward pass it repeats."""
    return getattr(_local, "recomputing", False)


Span = tuple[int, int, int, int]


def _evaluate(fn: PieceFn, spans: list[Span], halo: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    joined: list[Tensor] = []
    autocast = _autocast(inputs[0].device.type)

    def task(part: slice) -> None:
        for b0, b1, start, stop in spans[part]:
            context = min(halo, start)
            with torch.autocast(**autocast):
                outputs = fn(context, *(x[b0:b1, start - context : stop] for x in inputs))
            if not joined:
                joined.extend(y.new_empty(*inputs[0].shape[:2], *y.shape[2:]) for y in outputs)
            for whole, piece in zip(joined, outputs, strict=True):
                whole[b0:b1, start:stop] = piece

    task(slice(0, 1))  # tells the shapes
    _side_by_side(task, 1, len(spans), inputs[0].device.type)
    return tuple(joined)


def _side_by_side(task: Callable[[slice], None], first: int, last: int, device: str) -> None:
    """Run *task* on equal shares of first .. last - 1, one for each thread: no operation waits for another thread."""
    shares = torch.get_num_threads() if device == "cpu" else 1
    edges = [first + (last - first) * i // shares for i in range(shares + 1)]
    run_tasks(task, [slice(a, b) for a, b in pairwise(edges) if b > a])


def _autocast(device: str) -> dict[str, Any]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "enabled": enabled, "dtype": dtype}


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: PieceFn, spans: list[Span], halo: int, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, params = tensors[:count], tensors[count:]
        ctx.fn, ctx.spans, ctx.halo, ctx.params = fn, spans, halo, params
        ctx.autocast = _autocast(inputs[0].device.type)
        ctx.save_for_backward(*inputs)
        return _evaluate(fn, spans, halo, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        wanted = [p for p, need in zip(ctx.params, needs[len(inputs) :], strict=True) if need]
        dinputs = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=False)]
        sums: dict[int, list[Tensor]] = {}  # of each share, so that the order of adding is always the same
        late: list[tuple[Tensor, Tensor]] = []  # what pieces give to the rows of the piece before them

        def task(part: slice) -> None:
            for b0, b1, start, stop in ctx.spans[part]:
                context = min(ctx.halo, start)
                rows = (slice(b0, b1), slice(start - context, stop))
                with torch.enable_grad(), torch.autocast(**ctx.autocast), _recompute():
                    pieces = [
                        x[rows].detach().requires_grad_(d is not None) for x, d in zip(inputs, dinputs, strict=True)
                    ]
                    outputs = ctx.fn(context, *pieces)
                leaves = [p for p in pieces if p.requires_grad]
                found = torch.autograd.grad(outputs, [*leaves, *wanted], [g[b0:b1, start:stop] for g in grads])
                for whole, piece in zip((d for d in dinputs if d is not None), found, strict=False):
                    whole[b0:b1, start:stop] = piece[:, context:]
                    if context:
                        late.append((whole[b0:b1, start - context : start], piece[:, :context]))
                if part.start in sums:
                    torch._foreach_add_(sums[part.start], list(found[len(leaves) :]))
                else:
                    sums[part.start] = [g.clone() for g in found[len(leaves) :]]

        _side_by_side(task, 0, len(ctx.spans), inputs[0].device.type)
        for rows, piece in late:
            rows += piece
        first, *others = (sums[start] for start in sorted(sums))
        for other in others:
            torch._foreach_add_(first, other)
        filled = iter(first)
        return None, None, None, None, *dinputs, *(next(filled) if need else None for need in needs[len(inputs) :])


class _Unread(torch.autograd.Function):
    """A linear layer whose output no one reads: right shape, no values, the usual gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1]).to(x.dtype)
        dx = (flat @ weight.to(x.dtype)).view(x.shape)
        dweight = (flat.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return dx, dweight, flat.sum(0).to(weight.dtype) if ctx.bias else None


@contextmanager
def _recompute() -> Iterator[None]:
    before, _local.recomputing = getattr(_local, "recomputing", False), True
    try:
        yield
    finally:
        _local.recomputing = before
