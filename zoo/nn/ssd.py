"""The state-space dual (SSD) of Mamba-2 by chunks, with a backward pass of its own (arXiv:2405.21060, §6).

    S_t = exp(a dt_t) S_{t-1} + dt_t x_t b_t^T,   y_t = S_t c_t

Within a chunk the recurrence is attention with the mask exp(sum of a dt); between chunks only states travel. Autograd
would keep the mask, the scores and several scaled copies of x; here the backward pass keeps x, y and the state before
each chunk, makes the rest again, and needs no gradient of the mask: with u_t = dt_t x_t and the running sum s of a dt,

    dL/ds_t = dL/dy_t . y_t - dL/du_t . u_t   (+ dL/dS . S where t ends a chunk).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = -80.0  # exponent: e^-80 = 2e-35
SPAN = 2048  # tokens whose scores exist at once: 2 MB a head of them stay in the caches


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, L, H, P] and the state [B, H, P, N] after the last token.

    Args:
        x: [B, L, H, P].
        dt: [B, L, H] step sizes; 0 leaves the state as it is.
        a: [H] negative.
        b, c: [B, L, G, N], G dividing H.
        state: [B, H, P, N] before the first token; zeros if None.
        chunk: tokens a chunk; changes the speed, not the result.
        skip: [H] weights of x itself in y, or None.
    """
    length = x.shape[1]
    chunk = min(chunk, 1 << max(0, (length - 1).bit_length()))
    padding = -length % chunk
    if padding:
        x, b, c = (F.pad(v, (0, 0, 0, 0, 0, padding)) for v in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, padding))
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])
    y, end = _SSD.apply(x, dt, a, b, c, state, chunk, skip)
    return y[:, :length], end


class _Span:
    """The parts of a stretch of whole chunks; m = batch · chunks · groups, R heads a group, Q tokens a chunk."""

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> None:
        batch, length, heads, width = x.shape
        groups, size = b.shape[2:]
        self.shape = (batch, length // chunk, groups, heads // groups, width, size)
        self.chunk = chunk
        self.dt = self.grouped(dt)  # [m, Q, R]
        self.x = self.grouped(x.flatten(2)).unflatten(-1, (-1, width))  # [m, Q, R, P]
        self.b, self.c = (self.grouped(v.flatten(2)) for v in (b, c))  # [m, Q, N]
        total = (self.grouped(dt * a)).transpose(1, 2).cumsum(-1)  # [m, R, Q]
        self.total = total
        self.reach = total.clamp_min(LEAST).exp_()
        self.left = (total[..., -1:] - total).clamp_(min=LEAST).exp_()
        self.whole = self.reach[..., -1]  # [m, R]
        decay = torch.sub(total[..., :, None], total[..., None, :])  # [m, R, Q, Q]
        # what decays to less is as good as nothing, and denormal numbers would slow products down many times
        self.decay = decay.clamp_(LEAST, 0).exp_().tril_()
        self.pairs = (self.c @ self.b.transpose(1, 2))[:, None]  # [m, 1, Q, Q]
        self.taken = self.x * self.dt[..., None]
        self.by_head = self.heads_first(self.taken)  # [m R, Q, P]

    def grouped(self, v: Tensor) -> Tensor:
        """[B, L, G f] -> [m, Q, f]; a view for one group."""
        batch, n, groups = self.shape[:3]
        return v.reshape(batch * n, self.chunk, groups, -1).transpose(1, 2).reshape(
            batch * n * groups, self.chunk, v.shape[-1] // groups
        )  # fmt: skip

    def flat(self, v: Tensor) -> Tensor:
        """[m, Q, ...] -> [B, L, G ...], the inverse."""
        batch, n, groups = self.shape[:3]
        v = v.reshape(batch * n, groups, self.chunk, -1).transpose(1, 2)
        return v.reshape(batch, n * self.chunk, -1)

    def heads_first(self, v: Tensor) -> Tensor:
        """[m, Q, R, P] -> [m R, Q, P]"""
        return v.transpose(1, 2).reshape(-1, self.chunk, v.shape[-1])

    def heads_last(self, v: Tensor) -> Tensor:
        """[m R, Q, P] -> [m, Q, R, P], a view."""
        return v.view(-1, self.shape[3], *v.shape[1:]).transpose(1, 2)

    def rows(self, v: Tensor) -> Tensor:
        """[m, R, Q] -> [m, Q, R, 1]"""
        return v.transpose(1, 2)[..., None]

    def scores(self) -> Tensor:
        return (self.decay * self.pairs).view(-1, self.chunk, self.chunk)  # [m R, Q, Q]

    def scaled(self) -> Tensor:
        return (self.taken * self.rows(self.left)).flatten(2)  # [m, Q, R P]

    def carry(self, left: Tensor, right: Tensor, first: Tensor, backwards: bool = False) -> Tensor:
        """States between chunks [B, n + 1, G, R, P, N], *first* included, where each adds *left* times *right*."""
        batch, n, groups, per = self.shape[:4]
        if batch * groups > 1 or torch.compiler.is_compiling():
            parts = [first[:, None], torch.bmm(left, right).view(batch, n, *first.shape[1:])]
            states = torch.cat(parts[::-1] if backwards else parts, 1)
        else:
            states = left.new_empty(1, n + 1, *first.shape[1:])
            states[:, -1 if backwards else 0] = first
            inner = states[0, :-1] if backwards else states[0, 1:]
            torch.bmm(left, right, out=inner.view(n, left.shape[1], right.shape[2]))
        kept = self.whole.view(batch, n, groups, per, 1, 1)
        for i in reversed(range(n)) if backwards else range(n):
            source, target = (i + 1, i) if backwards else (i, i + 1)
            states[:, target].addcmul_(states[:, source], kept[:, i])
        return states

    def merged(self, states: Tensor) -> Tensor:
        """[B, n, G, R, P, N] -> [m, R P, N]"""
        return states.flatten(3, 4).flatten(0, 2)


def _forward(span: _Span, now: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, L, H P] and the states between chunks [B, n + 1, G, R, P, N], from *now* [B, G, R, P, N]."""
    inside = torch.bmm(span.scores(), span.by_head)
    states = span.carry(span.scaled().transpose(1, 2), span.b, now)
    y = torch.bmm(span.c, span.merged(states[:, :-1]).transpose(1, 2)).view_as(span.taken)
    y = y.mul_(span.rows(span.reach)).add_(span.heads_last(inside))
    return span.flat(y), states


def _backward(span: _Span, dy: Tensor, dtotal: Tensor, states: Tensor, after: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a span's x, dt, b, c, a, and of the state before it.

    Args:
        dy: [m, Q, R, P].
        dtotal: [m, Q, R], dy . y; it is overwritten.
        states: [B, n + 1, G, R, P, N] between chunks.
        after: [B, G, R, P, N] gradient of the state after the span.
    """
    arriving = (dy * span.rows(span.reach)).flatten(2)  # [m, Q, R P]
    reached = span.carry(arriving.transpose(1, 2), span.c, after, backwards=True)
    carried = span.merged(reached[:, 1:])  # [m, R P, N]
    dc = torch.bmm(arriving, span.merged(states[:, :-1]))
    db = torch.bmm(span.scaled(), carried)
    dtaken = torch.bmm(span.b, carried.transpose(1, 2)).view_as(span.taken).mul_(span.rows(span.left))
    dy_by_head = span.heads_first(dy)
    dtaken += span.heads_last(torch.bmm(span.scores().transpose(1, 2), dy_by_head))
    pairs = torch.bmm(dy_by_head, span.by_head.transpose(1, 2)).view_as(span.decay).mul_(span.decay)
    pairs = pairs.sum(1) if pairs.shape[1] > 1 else pairs[:, 0]  # [m, Q, Q]
    dc.baddbmm_(pairs, span.b)
    db.baddbmm_(pairs.transpose(1, 2), span.c)
    along = (span.x * dtaken).sum(-1)  # [m, Q, R]
    dtotal.addcmul_(along, span.dt, value=-1)
    ends, later = (t[:, 1:].reshape(-1, 1, span.shape[4] * span.shape[5]) for t in (states, reached))
    dtotal[:, -1] += torch.bmm(ends, later.transpose(1, 2)).view(len(dtotal), -1)
    later = dtotal.flip(1).cumsum(1).flip(1)  # gradient of a dt
    rate = span.grouped(a.expand(span.shape[0], span.shape[1] * span.chunk, -1))
    ddt = torch.addcmul(along, later, rate)
    da = span.flat(later * span.dt).sum((0, 1))
    return span.flat(dtaken.mul_(span.dt[..., None])), span.flat(ddt), span.flat(db), span.flat(dc), da, reached[:, 0]


class _SSD(torch.autograd.Function):
    """`ssd` of whole chunks, a span of them at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        chunk: int,
        skip: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = x.shape
        groups = b.shape[2]
        now = state.reshape(batch, groups, heads // groups, width, -1)
        outputs, kept, span = [], [], None
        step = max(chunk, SPAN // chunk * chunk)
        for start in range(0, length, step):
            here = slice(start, min(start + step, length))
            span = _Span(x[:, here], dt[:, here], a, b[:, here], c[:, here], chunk)
            y, states = _forward(span, now)
            now = states[:, -1]
            outputs.append(y)
            kept.append(states)
        y = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).view(x.shape)
        end = now.reshape(state.shape).clone()
        ctx.chunk, ctx.step = chunk, step
        ctx.span = span if length <= step and any(ctx.needs_input_grad) else None  # short: not worth making again
        if skip is not None:
            y.addcmul_(x, skip[:, None])
        ctx.save_for_backward(x, dt, a, b, c, y, skip, *kept)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dend: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, y, skip, *kept = ctx.saved_tensors
        batch, length, heads, width = x.shape
        groups, size = b.shape[2:]
        da, after = torch.zeros_like(a), dend.reshape(batch, groups, heads // groups, width, size)
        dskip = None if skip is None else torch.zeros_like(skip)
        found: list[list[Tensor]] = []
        with torch.autocast(x.device.type, enabled=False):
            for start, states in reversed(list(zip(range(0, length, ctx.step), kept, strict=True))):
                here = slice(start, min(start + ctx.step, length))
                span = ctx.span or _Span(x[:, here], dt[:, here], a, b[:, here], c[:, here], ctx.chunk)
                g = span.grouped(dy[:, here].flatten(2)).view_as(span.taken)
                dtotal = (g * span.grouped(y[:, here].flatten(2)).view_as(span.taken)).sum(-1)  # [m, Q, R]
                if skip is not None:  # y holds it, which decays know nothing of
                    straight = (g * span.x).sum(-1)
                    dtotal -= straight * span.grouped(skip.expand(batch, here.stop - start, -1))
                    dskip += span.flat(straight).sum((0, 1))
                parts = _backward(span, g, dtotal, states, after, a)
                found.append(
                    [part.view(batch, -1, *t.shape[2:]) for part, t in zip(parts, (x, dt, b, c), strict=False)]
                )
                if skip is not None:
                    found[-1][0].addcmul_(dy[:, here], skip[:, None])
                da += parts[4]
                after = parts[5]
        if len(found) == 1:
            dx, ddt, db, dc = found[0]
        else:
            dx, ddt, db, dc = (torch.cat(parts[::-1], 1) for parts in zip(*found, strict=True))
        return dx, ddt, da, db, dc, after.reshape(dend.shape), None, dskip
