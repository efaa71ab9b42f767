"""What a neural memory computes for every token: surprises of its network and answers from it, with backward passes.

The network is f(x) = x + LayerNorm(MLP(x)) (1 + gain) with GELU between its matrices (arXiv:2501.00663, §3). A surprise
is a gradient of f's squared error, so that training differentiates f twice; written out, one exponential and one error
function a hidden value serve both passes, and tokens that meet the same weights share one matrix product.
Weights of a network lie in one row [P]: gain [d], then each matrix [a, b].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5
Sizes = tuple[tuple[int, int], ...]


def surprises(k: Tensor, v: Tensor, rate: Tensor, flat: Tensor, sizes: Sizes) -> Tensor:
    """Gradients in the weights of sum_c rate_c mean_d (f(k_c) - v_c)², a chunk at a time, at weights shared by chunks.

    Args:
        k, v: [G, M, C, d], M chunks for each of G networks.
        rate: [G, M, C].
        flat: [G, P].
        sizes: of the matrices.

    Returns:
        [G, M, P].
    """
    return _Surprises.apply(k, v, rate, flat, sizes)


def answers(q: Tensor, flat: Tensor, sizes: Sizes) -> Tensor:
    """f(q): q [M, C, d] with a network's weights for each of M chunks, flat [M, P] -> [M, C, d]."""
    return _Answers.apply(q, flat, sizes)


def apart(flat: Tensor, sizes: Sizes) -> list[Tensor]:
    """[G, P] -> views: gain [G, 1, d] and matrices [G, a, b]."""
    parts = flat.split([sizes[-1][1], *(a * b for a, b in sizes)], dim=-1)
    return [parts[0].unsqueeze(-2), *(part.unflatten(-1, size) for part, size in zip(parts[1:], sizes, strict=True))]


def _layers(x: Tensor, matrices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of each matrix, and what each puts out: x [G, R, a]."""
    inputs, outputs = [x], [torch.bmm(x, matrices[0])]
    for matrix in matrices[1:]:
        inputs.append(F.gelu(outputs[-1]))
        outputs.append(torch.bmm(inputs[-1], matrix))
    return inputs, outputs


def _unit(h: Tensor) -> tuple[Tensor, Tensor]:
    """h [..., d] less its mean and over its deviation, in place, and the factor [..., 1]."""
    h.sub_(h.mean(-1, keepdim=True))
    scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(EPS).rsqrt_()
    return h.mul_(scale), scale


def _along(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


def _project(g: Tensor, unit: Tensor, scale: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    """Back through `_unit`: scale (g - mean g - unit (mean(g unit) + extra))."""
    mean = g.mean(-1, keepdim=True)
    return torch.addcmul(g - mean, unit, _along(g, unit) + extra, value=-1).mul_(scale)


class _Surprises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, rate: Tensor, flat: Tensor, sizes: Sizes) -> Tensor:
        networks, chunks, chunk, width = k.shape
        gain, *matrices = apart(flat, sizes)
        gain = gain + 1
        k, v = (t.reshape(networks, -1, width) for t in (k, v))  # [G, R, d]
        rate = rate.reshape(networks, -1, 1) * (2 / width)
        inputs, outputs = _layers(k, matrices)
        unit, scale = _unit(outputs.pop())
        error = torch.addcmul(k, unit, gain).sub_(v)
        delta = error * rate
        along = delta * unit
        slope = along.reshape(networks, chunks, chunk, width).sum(2)
        lean = torch.bmm(along, gain.transpose(1, 2)).div_(width)  # [G, R, 1]
        delta.mul_(gain)
        delta = delta.sub_(delta.mean(-1, keepdim=True)).addcmul_(unit, lean, value=-1).mul_(scale)
        by_chunk = lambda t: t.reshape(networks * chunks, chunk, -1)
        parts, kept = [], [delta]
        for i in reversed(range(len(sizes))):
            part = torch.bmm(by_chunk(inputs[i]).transpose(1, 2), by_chunk(delta))
            parts.append(part.view(networks, chunks, -1))
            if i:
                before = torch.bmm(delta, matrices[i].transpose(1, 2))
                z = outputs[i - 1]
                slopes = torch.ops.aten.gelu_backward(torch.ones((), dtype=z.dtype, device=z.device).expand_as(z), z)
                square = z * z
                # gelu''(z) = (2 - z²) exp(-z²/2) / sqrt(2 π)
                bend = (2 - square).mul_(square.mul_(-0.5).exp_()).mul_((2 * math.pi) ** -0.5).mul_(before)
                delta = before.mul_(slopes)
                kept += [delta, slopes, bend]
        ctx.shape, ctx.sizes = (networks, chunks, chunk, width), sizes
        ctx.save_for_backward(flat, rate, unit, scale, error, lean, *inputs, *kept)
        return torch.cat([slope, *reversed(parts)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        networks, chunks, chunk, width = ctx.shape
        sizes, depth = ctx.sizes, len(ctx.sizes)
        flat, rate, unit, scale, error, lean, *rest = ctx.saved_tensors
        inputs, kept = rest[:depth], rest[depth:]
        deltas = [kept[0], *kept[1::3]][::-1]  # of each layer's output, the first layer first
        slopes, bends = kept[2::3][::-1], kept[3::3][::-1]  # of each hidden layer
        gain, *matrices = apart(flat, sizes)
        gain = gain + 1
        by_chunk = lambda t: t.reshape(networks * chunks, chunk, -1)
        with torch.autocast(g.device.type, enabled=False):
            dgain, *dparts = apart(g.flatten(0, 1), sizes)  # [G M, ..]
            dgain = dgain.view(networks, chunks, 1, width)
            dmatrices: list[Tensor] = [torch.empty(0)] * depth
            dinputs, bent, ddelta = [], [], None
            for i in range(depth):  # back through the chain of deltas, which ran from the last layer to the first
                dinputs.append(torch.bmm(by_chunk(deltas[i]), dparts[i].transpose(1, 2)).view_as(inputs[i]))
                own = torch.bmm(by_chunk(inputs[i]), dparts[i]).view_as(deltas[i])
                if i:
                    assert ddelta is not None
                    bent.append(ddelta * bends[i - 1])
                    dbefore = ddelta.mul_(slopes[i - 1])
                    dmatrices[i] = torch.bmm(dbefore.transpose(1, 2), deltas[i])
                    own.baddbmm_(dbefore, matrices[i])
                ddelta = own
            assert ddelta is not None
            delta = error * rate
            mean = _along(ddelta, unit)
            extra = _along(ddelta, deltas[-1])
            dunit = torch.mul(ddelta, lean).addcmul_(delta * gain, mean).mul_(-scale)
            ddelta.sub_(ddelta.mean(-1, keepdim=True)).addcmul_(unit, mean, value=-1).mul_(scale)
            dgains = (ddelta * delta).sum(1, keepdim=True)
            by_chunks = lambda t: t.view(networks, chunks, chunk, width)
            by_chunks(dunit).addcmul_(by_chunks(delta), dgain)
            ddelta.mul_(gain)
            by_chunks(ddelta).addcmul_(by_chunks(unit), dgain)
            drate = (ddelta * error).sum(-1).mul_(2 / width)
            derror = ddelta.mul_(rate)
            dunit.addcmul_(derror, gain)
            dgains += (derror * unit).sum(1, keepdim=True)
            dh = _project(dunit, unit, scale, extra)
            dk = derror
            for i in reversed(range(depth)):
                dmatrix = torch.bmm(inputs[i].transpose(1, 2), dh)
                dmatrices[i] = dmatrix if not dmatrices[i].numel() else dmatrices[i] + dmatrix
                dinput = dinputs[i].baddbmm_(dh, matrices[i].transpose(1, 2))
                dh = dinput.mul_(slopes[i - 1]).add_(bent[i - 1]) if i else dinput
            dflat = torch.cat([dgains.flatten(1), *(t.flatten(1) for t in dmatrices)], dim=-1)
        shape = (networks, chunks, chunk)
        return (dk + dh).view(*shape, width), derror.neg().view(*shape, width), drate.view(shape), dflat, None


class _Answers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, flat: Tensor, sizes: Sizes) -> Tensor:
        gain, *matrices = apart(flat, sizes)
        inputs, outputs = _layers(q, matrices)
        unit, scale = _unit(outputs.pop())
        ctx.sizes = sizes
        ctx.save_for_backward(flat, unit, scale, *inputs, *outputs)
        return torch.addcmul(q, unit, gain + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.sizes)
        flat, unit, scale, *rest = ctx.saved_tensors
        inputs, outputs = rest[:depth], rest[depth:]
        gain, *matrices = apart(flat, ctx.sizes)
        dflat = torch.empty_like(flat)
        dgain, *dmatrices = apart(dflat, ctx.sizes)
        with torch.autocast(g.device.type, enabled=False):
            dgain.copy_((g * unit).sum(1, keepdim=True))
            dh = _project(g * (gain + 1), unit, scale)
            for i in reversed(range(depth)):
                dmatrices[i].copy_(torch.bmm(inputs[i].transpose(1, 2), dh))
                dh = torch.bmm(dh, matrices[i].transpose(1, 2))
                dh = torch.ops.aten.gelu_backward(dh, outputs[i - 1]) if i else dh
        return g + dh, dflat, None
