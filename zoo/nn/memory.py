"""Neural memory: a small network whose weights are the state, trained while the sequence passes (arXiv:2501.00663)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State

_SPAN = 8  # chunks whose updated weights exist at once in training
Weights = list[Tensor]  # gain [..., dh], then one matrix a layer


@config
class NeuralMemoryConfig:
    """Neural memory layer.

    Attributes:
        heads: H memories.
        head_dim: width of each; None for d_model / heads.
        chunk: tokens that share one update; a token reads the weights after every chunk that is complete with it.
        depth: layers of the memory network.
        expansion: its inner width over head_dim.
        momentum_order: how many times surprises are smoothed by a learned momentum.
        qk_norm: RMS norm of each head's queries and keys.
        max_lr: largest learned step size.
        refresh: after how many chunks the weights that surprises are taken at become the current ones; 0 keeps the
            initial ones (the reference implementation's default), 1 is the paper's rule.
    """

    heads: int = 1
    head_dim: int | None = None
    chunk: int = 64
    depth: int = 2
    expansion: float = 4.0
    momentum_order: int = 1
    qk_norm: bool = False
    max_lr: float = 1.0
    refresh: int = 0


@dataclass
class MemoryState(State):
    """State of a neural memory.

    Attributes:
        weights: current weights, each [B, H, ...].
        momentum: one list a momentum order.
        base: weights that surprises are taken at; empty where they stay the initial ones.
        held: [B, chunk - 1, D] tokens of the chunk that is not complete yet.
        seen: [B] tokens consumed.
    """

    weights: Weights
    momentum: list[Weights]
    base: Weights
    held: Tensor
    seen: Tensor


def memory_network(x: Tensor, weights: Weights) -> Tensor:
    """x + LayerNorm(MLP(x)) · (1 + gain): x [..., C, d] with weights of the same leading axes."""
    h = x
    for i, matrix in enumerate(weights[1:]):
        h = (F.gelu(h) if i else h) @ matrix
    return F.layer_norm(h, h.shape[-1:]) * (weights[0] + 1)[..., None, :] + x


def memory_gradient(k: Tensor, v: Tensor, rate: Tensor, weights: Weights) -> Weights:
    """Gradient in the weights of sum_c rate_c mean_d (network(k_c) - v_c)²: k, v [..., C, d], rate [..., C].

    Written out, so that training differentiates it once more like any other function.
    """
    inputs, before, h = [], [], k
    for i, matrix in enumerate(weights[1:]):
        inputs.append(F.gelu(h) if i else h)
        before.append(h)
        h = inputs[-1] @ matrix
    centred = h - h.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    unit = centred * scale
    error = unit * (weights[0] + 1)[..., None, :] + k - v
    delta = error * rate[..., None] * (2 / k.shape[-1])
    grads = [(delta * unit).sum(-2)]
    delta = delta * (weights[0] + 1)[..., None, :]
    delta = scale * (delta - delta.mean(-1, keepdim=True) - unit * (delta * unit).mean(-1, keepdim=True))
    matrices: Weights = []
    for i in reversed(range(len(inputs))):
        matrices.append(inputs[i].transpose(-1, -2) @ delta)
        if i:
            delta = _GeluSlope.apply(delta @ weights[i + 1].transpose(-1, -2), before[i])
    return grads + matrices[::-1]


class _GeluSlope(torch.autograd.Function):
    """delta · gelu'(z). Training differentiates it: gelu''(z) = (2 - z²) exp(-z²/2) / sqrt(2 π)."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(delta, z)
        return torch.ops.aten.gelu_backward(delta, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        delta, z = ctx.saved_tensors
        square = z * z
        dz = (2 - square).mul_(square.mul_(-0.5).exp_()).mul_(delta).mul_(g).mul_((2 * torch.pi) ** -0.5)
        return torch.ops.aten.gelu_backward(g, z), dz


class NeuralMemory(RowMixer):
    """Store keys -> values, retrieve by queries, causally. x [B, L, D] -> [B, L, D].

    For each chunk: surprise s = -gradient of the recall loss; momentum m <- η m + s (again for each further order);
    weights θ <- (1 - α) θ + m (eqs. 10, 13), with η, α and the step sizes learned functions of the tokens.

    Raises:
        ConfigError: one head whose width is not d_model, or heads that do not divide d_model.
    """

    Config = NeuralMemoryConfig

    def __init__(self, d_model: int, config: NeuralMemoryConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        heads = config.heads
        if config.head_dim is None and d_model % heads:
            raise ConfigError(f"a neural memory of {heads} heads needs a d_model they divide, got {d_model}")
        width = config.head_dim or d_model // heads
        if heads == 1 and width != d_model:
            raise ConfigError(f"a neural memory of one head has the width of the model, {d_model}, not {width}")
        self.width = width
        hidden = int(width * config.expansion)
        sizes = [width, *[hidden] * (config.depth - 1), width]
        self.retrieve_norm, self.store_norm = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.q_norm = nn.Parameter(torch.zeros(heads, 1, width)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.zeros(heads, 1, width)) if config.qk_norm else None
        self.memory = nn.ParameterList([nn.Parameter(torch.zeros(heads, width))])
        for a, b in itertools.pairwise(sizes):
            matrix = torch.empty(a, b)
            nn.init.xavier_uniform_(matrix)
            self.memory.append(nn.Parameter(matrix.repeat(heads, 1, 1)))
        self.q_proj = nn.Linear(d_model, heads * width, bias=False)
        self.k_proj = nn.Linear(d_model, heads * width, bias=False)
        self.v_proj = nn.Linear(d_model, heads * width, bias=False)
        self.step_size = nn.Linear(d_model, heads)
        self.momentum = nn.Linear(d_model, heads * config.momentum_order)
        self.decay = nn.Linear(d_model, heads)
        self.gate = nn.Linear(d_model, heads, bias=False) if heads > 1 else None
        self.out_proj = nn.Linear(heads * width, d_model, bias=False) if heads > 1 else None
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="heads")

    def mix(self, x: Tensor, count: Tensor | None, state: MemoryState | None) -> tuple[Tensor, MemoryState | None]:
        if state is None:
            begun = self.begin(x.shape[0], x.device, work_dtype(x))
            total = begun.seen + x.shape[1] if count is None else count
            return self.run(x, total, begun, count is None)[0].to(x.dtype), None
        joined, total, place = join(x, count, state.held, state.seen % self.config.chunk)
        y, weights, momentum, base = self.run(joined, total, state)
        y = y.gather(1, place[..., None].expand_as(x)).to(x.dtype)
        held = rest(joined, total, self.config.chunk).to(state.held.dtype)
        seen = state.seen + (x.shape[1] if count is None else count)
        return y, MemoryState(weights, momentum, base, held, seen)

    def run(
        self, x: Tensor, total: Tensor, state: MemoryState, alike: bool = False
    ) -> tuple[Tensor, Weights, list[Weights], Weights]:
        """Rows x [B, L, D], beginning at a chunk's border, of which `total` [B] places are real (all, if *alike*)."""
        chunk, length = self.config.chunk, x.shape[1]
        chunks = -(-length // chunk)
        x = F.pad(x, (0, 0, 0, chunks * chunk - length))
        span = 1 if self.config.refresh else _SPAN
        done = state.seen // chunk  # chunks completed before
        weights, momentum, base = state.weights, state.momentum, state.base
        parts = []
        for start in range(0, chunks, span):
            stop = min(start + span, chunks)
            part = x[:, start * chunk : stop * chunk]
            whole = torch.arange(start + 1, stop + 1, device=x.device) <= (total // chunk)[:, None]  # [B, n]
            full = alike and stop * chunk <= length  # known without looking
            inputs = (part, None if full else whole, weights, momentum, base)
            if torch.is_grad_enabled() and chunks > span:
                y, weights, momentum = checkpoint(self._span, *inputs, use_reentrant=False)
            else:
                y, weights, momentum = self._span(*inputs)
            parts.append(y)
            if self.config.refresh:
                due = whole[:, 0] & ((done + start + 1) % self.config.refresh == 0)
                base = [torch.where(_like(due, old), new, old) for old, new in zip(base, weights, strict=True)]
        return torch.cat(parts, 1)[:, :length], weights, momentum, base

    def _span(
        self, x: Tensor, whole: Tensor | None, weights: Weights, momentum: list[Weights], base: Weights
    ) -> tuple[Tensor, Weights, list[Weights]]:
        """Whole chunks x [B, n·C, D]; those not `whole` [B, n] (None: all are) leave the weights as they are."""
        chunk, heads = self.config.chunk, self.config.heads
        n = x.shape[1] // chunk
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weights[0].dtype)
            stored = self._norm(x, self.store_norm)
            k, v = (self._heads(self._linear(stored, proj), n) for proj in (self.k_proj, self.v_proj))
            if self.k_norm is not None:
                k = self._head_norm(k, self.k_norm)
            rate = self._linear(stored, self.step_size).sigmoid() * self.config.max_lr  # [B, L, H]
            rate = rate.unflatten(1, (n, chunk)).permute(0, 3, 1, 2)  # [B, H, n, C]
            pooled = stored.unflatten(1, (n, chunk)).mean(2)
            keep = 1 - self._linear(pooled, self.decay).sigmoid()  # [B, n, H]
            eta = self._linear(pooled, self.momentum).sigmoid().unflatten(-1, (heads, -1))  # [B, n, H, orders]
            at = [w[:, :, None] for w in base] if base else [w.to(x.dtype)[None, :, None] for w in self.memory]
            # all weights of a memory side by side: a chunk's update is a few operations
            slope = torch.cat([g.flatten(3) for g in memory_gradient(k, v, rate, at)], -1)  # [B, H, n, P]
            now = torch.cat([w.flatten(2) for w in weights], -1)
            moving = [torch.cat([m.flatten(2) for m in one], -1) for one in momentum]
            states = [now]
            for i in range(n):
                step, fresh, real = -slope[:, :, i], [], None if whole is None else whole[:, i, None, None]
                for order, old in enumerate(moving):
                    step = torch.addcmul(step, eta[:, i, :, order, None], old)
                    fresh.append(step)
                new = torch.addcmul(step, keep[:, i, :, None], now)
                now = new if real is None else torch.where(real, new, now)
                moving = fresh if real is None else [torch.where(real, *p) for p in zip(fresh, moving, strict=True)]
                states.append(now)
            y = self.read(x, self._apart(torch.stack(states, 2), weights))
        return y, self._apart(now, weights), [self._apart(one, weights) for one in moving]

    @staticmethod
    def _apart(flat: Tensor, like: Weights) -> Weights:
        """[B, H, ..., P] -> one view [B, H, ..., *] for each weight [B, H, *] of *like*."""
        parts = flat.split([w[0, 0].numel() for w in like], dim=-1)
        return [part.unflatten(-1, w.shape[2:]) for part, w in zip(parts, like, strict=True)]

    def read(self, x: Tensor, weights: Weights) -> Tensor:
        """Retrieve for x [B, n·C, D] from weights [B, H, n + 1, ...]: the last token of a chunk reads the next ones."""
        n, length = weights[0].shape[2], x.shape[1]
        x = F.pad(x, (0, 0, 1, self.config.chunk - 1))
        read = self._norm(x, self.retrieve_norm)
        q = self._heads(self._linear(read, self.q_proj), n)
        if self.q_norm is not None:
            q = self._head_norm(q, self.q_norm)
        y = memory_network(q, weights).flatten(2, 3).transpose(1, 2)  # [B, L, H, dh]
        if self.gate is not None:
            y = y * self._linear(read, self.gate).sigmoid()[..., None]
        y = y.flatten(2)[:, 1 : 1 + length]
        return y if self.out_proj is None else self._linear(y, self.out_proj)

    def _heads(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2).unflatten(2, (n, -1))  # [B, H, n, C, dh]

    @staticmethod
    def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def _norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)

    @staticmethod
    def _head_norm(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (gain.to(x.dtype) + 1)[None, :, None]

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        """The state before any token: the learned initial weights."""
        weights = [w.to(device=device, dtype=dtype).expand(batch, *w.shape) for w in self.memory]
        return MemoryState(
            weights=weights,
            momentum=[[torch.zeros_like(w) for w in weights] for _ in range(self.config.momentum_order)],
            base=list(weights) if self.config.refresh else [],
            held=torch.zeros(batch, self.config.chunk - 1, self.d_model, device=device, dtype=dtype),
            seen=torch.zeros(batch, dtype=torch.long, device=device),
        )

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> MemoryState:
        """The state before any token: constant in max_len."""
        state = self.begin(batch, device, dtype if dtype == torch.float64 else torch.float32)
        return state.detach()._map(torch.Tensor.contiguous)

    def cost(self, length: int, batch: int = 1) -> Cost:
        cfg = self.config
        size = sum(w.numel() for w in self.memory)
        copies = 1 + cfg.momentum_order + (1 if cfg.refresh else 0)
        rest_ = sum(p.numel() for p in self.parameters()) - size
        state = 4 * (copies * size + (cfg.chunk - 1) * self.d_model) + 8
        per_chunk = 4 * copies * size * -(-length // cfg.chunk)
        return Cost(flops=float(batch * (length * (2 * rest_ + 8 * size) + per_chunk)), state_bytes=batch * state)


def join(x: Tensor, count: Tensor | None, held: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put each row's first `kept` [B] held tokens before its new ones, x [B, L, D], without a gap.

    Returns:
        rows [B, held + L, D], their lengths [B], and where each new token stands in them [B, L].
    """
    batch, length, _ = x.shape
    new = torch.full((batch,), length, device=x.device) if count is None else count
    both = torch.cat([held.to(x.dtype), x], dim=1)
    index = torch.arange(both.shape[1], device=x.device)
    source = torch.where(index < kept[:, None], index, index - kept[:, None] + held.shape[1])
    total = kept + new
    rows = both.gather(1, source.clamp_max(both.shape[1] - 1)[..., None].expand_as(both))
    rows = rows.masked_fill((index >= total[:, None])[..., None], 0)
    return rows, total, kept[:, None] + torch.arange(length, device=x.device)


def rest(rows: Tensor, total: Tensor, chunk: int) -> Tensor:
    """The tokens of each row's last, incomplete chunk, left-aligned [B, chunk - 1, D]."""
    index = (total // chunk * chunk)[:, None] + torch.arange(chunk - 1, device=rows.device)
    inside = (index < total[:, None])[..., None]
    index = index.clamp_max(rows.shape[1] - 1)[..., None].expand(-1, -1, rows.shape[2])
    return rows.gather(1, index).masked_fill(~inside, 0)


def _like(a: Tensor, b: Tensor) -> Tensor:
    return a.reshape(*a.shape, *[1] * (b.ndim - a.ndim))
