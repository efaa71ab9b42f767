"""Neural memory: a small network whose weights are the state, trained while the sequence passes (arXiv:2501.00663)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.norm import rms_unit
from zoo.nn.recall import answers, apart, surprises
from zoo.nn.rows import RowMixer
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State

_SPAN = 4096  # tokens of a span: their products are large enough, and their weights' updates few enough
_CHUNKS = 16  # chunks of a span, whose updated weights exist at once in training
_KEPT = 8192  # tokens up to which training keeps all spans; those of longer sequences are computed again
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
    """x + LayerNorm(MLP(x)) · (1 + gain): x [..., C, d] with weights of the same leading axes.

    The definition that `zoo.nn.recall` computes, and its tests' oracle.
    """
    h = x
    for i, matrix in enumerate(weights[1:]):
        h = (F.gelu(h) if i else h) @ matrix
    return F.layer_norm(h, h.shape[-1:]) * (weights[0] + 1)[..., None, :] + x


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
        self.sizes = tuple(itertools.pairwise([width, *[hidden] * (config.depth - 1), width]))
        self.retrieve_norm, self.store_norm = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.q_norm = nn.Parameter(torch.zeros(heads, 1, width)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.zeros(heads, 1, width)) if config.qk_norm else None
        self.memory = nn.ParameterList([nn.Parameter(torch.zeros(heads, width))])
        for a, b in self.sizes:
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
        if chunks * chunk > length:
            x = F.pad(x, (0, 0, 0, chunks * chunk - length))
        span = 1 if self.config.refresh else max(1, min(_CHUNKS, _SPAN // chunk))
        done = state.seen // chunk  # chunks completed before
        weights = self._flat(state.weights)
        momentum, base = [self._flat(one) for one in state.momentum], self._flat(state.base) if state.base else None
        parts = []
        for start in range(0, chunks, span):
            stop = min(start + span, chunks)
            part = x[:, start * chunk : stop * chunk]
            whole = torch.arange(start + 1, stop + 1, device=x.device) <= (total // chunk)[:, None]  # [B, n]
            full = alike and stop * chunk <= length  # known without looking
            inputs = (part, None if full else whole, weights, momentum, base)
            if torch.is_grad_enabled() and chunks * chunk > _KEPT and chunks > span:
                y, weights, momentum = checkpoint(self._span, *inputs, use_reentrant=False)
            else:
                y, weights, momentum = self._span(*inputs)
            parts.append(y)
            if base is not None:
                due = whole[:, 0] & ((done + start + 1) % self.config.refresh == 0)
                base = torch.where(due[:, None, None], weights, base)
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, :length]
        return (
            y,
            self._apart(weights),
            [self._apart(one) for one in momentum],
            [] if base is None else self._apart(base),
        )

    def _span(
        self, x: Tensor, whole: Tensor | None, weights: Tensor, momentum: list[Tensor], base: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Whole chunks x [B, n·C, D]; those not `whole` [B, n] (None: all are) leave the weights [B, H, P] alone."""
        chunk, heads, batch = self.config.chunk, self.config.heads, x.shape[0]
        n = x.shape[1] // chunk
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weights.dtype)
            unit = rms_unit(x, self._eps(x))
            # both norms differ in their weights alone, which the projections take over: one product for all of them
            stored, read = self.store_norm.weight.to(x.dtype), self.retrieve_norm.weight.to(x.dtype)
            kinds = [(self.k_proj, stored), (self.v_proj, stored), (self.step_size, stored), (self.q_proj, read)]
            k, v, rate, q, *gate = self._together(unit, kinds if self.gate is None else [*kinds, (self.gate, read)])
            k, v, rate = (self._networks(t.unflatten(-1, (heads, -1)), n, base) for t in (k, v, rate))
            if self.k_norm is not None:
                k = self._head_norm(k, self._per_network(self.k_norm, batch, base)[:, None])
            rate = rate.squeeze(-1)
            rate = (rate + self._per_network(self.step_size.bias.to(x.dtype)[:, None, None], batch, base)).sigmoid()
            rate = rate * self.config.max_lr  # [G, M, C]
            pooled = unit.unflatten(1, (n, chunk)).mean(2)
            keep, eta = self._together(pooled, [(self.decay, stored), (self.momentum, stored)])
            keep = 1 - (keep + self.decay.bias.to(x.dtype)).sigmoid()  # [B, n, H]
            eta = (eta + self.momentum.bias.to(x.dtype)).sigmoid().unflatten(-1, (heads, -1))  # [B, n, H, orders]
            at = self._flat([w.to(x.dtype) for w in self.memory]) if base is None else base.flatten(0, 1)
            slope = surprises(k, v, rate, at, self.sizes)  # [G, M, P]
            if base is None:
                slope = slope.unflatten(1, (batch, n)).transpose(0, 1)  # [B, H, n, P]
            else:
                slope = slope.unflatten(0, (batch, heads))
            now, moving, states = weights, list(momentum), [weights]
            for i, gradient in enumerate(slope.unbind(2)):
                step, fresh, real = -gradient, [], None if whole is None else whole[:, i, None, None]
                for order, old in enumerate(moving):
                    step = torch.addcmul(step, eta[:, i, :, order, None], old)
                    fresh.append(step)
                new = torch.addcmul(step, keep[:, i, :, None], now)
                now = new if real is None else torch.where(real, new, now)
                moving = fresh if real is None else [torch.where(real, *p) for p in zip(fresh, moving, strict=True)]
                states.append(now)
            y = self._answer(q, gate, states)
        return y, now, moving

    def read(self, x: Tensor, weights: Weights) -> Tensor:
        """Retrieve for x [B, n·C, D] from weights [B, H, n + 1, ...]: the last token of a chunk reads the next ones."""
        unit = rms_unit(x, self._eps(x))
        norm = self.retrieve_norm.weight.to(x.dtype)
        kinds = [(self.q_proj, norm)]
        q, *gate = self._together(unit, kinds if self.gate is None else [*kinds, (self.gate, norm)])
        return self._answer(q, gate, list(self._flat(weights).unbind(2)))

    def _answer(self, q: Tensor, gate: list[Tensor], states: list[Tensor]) -> Tensor:
        """Answers to q [B, n·C, H dh] from n + 1 states [B, H, P], of which the last serves the last token alone."""
        batch, length = q.shape[:2]
        q = q.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)  # [B, H, L, dh]
        if self.q_norm is not None:
            q = self._head_norm(q, self.q_norm)
        flat = torch.stack(states[:-1], 2).flatten(0, 2)  # [B H n, P]
        chunks = F.pad(q[:, :, :-1], (0, 0, 1, 0)).reshape(len(flat), -1, self.width)
        most = answers(chunks, flat, self.sizes).view(batch, -1, length, self.width)
        last = answers(q[:, :, -1:].reshape(-1, 1, self.width), states[-1].flatten(0, 1), self.sizes)
        y = torch.cat([most[:, :, 1:], last.view(batch, -1, 1, self.width)], 2)
        if gate:
            y = y * gate[0].transpose(1, 2).sigmoid()[..., None]
        y = y.transpose(1, 2).flatten(2)
        return y if self.out_proj is None else F.linear(y, self.out_proj.weight.to(y.dtype))

    def _networks(self, x: Tensor, n: int, base: Tensor | None) -> Tensor:
        """[B, n·C, H, d] -> [G, M, C, d]: a network a head for all rows, or one for each row and head (*base*)."""
        batch, _, heads, width = x.shape
        if base is None:
            return x.permute(2, 0, 1, 3).reshape(heads, batch * n, -1, width)
        return x.transpose(1, 2).reshape(batch * heads, n, -1, width)

    @staticmethod
    def _per_network(x: Tensor, batch: int, base: Tensor | None) -> Tensor:
        """A parameter a head [H, 1, ...] -> [G, 1, ...]."""
        return x if base is None else x.repeat(batch, *[1] * (x.ndim - 1))

    @staticmethod
    def _together(x: Tensor, layers: list[tuple[nn.Linear, Tensor]]) -> list[Tensor]:
        """Linear maps of x · scale without their biases, each with its scale [D], by one product."""
        weight = torch.cat([layer.weight.to(x.dtype) * scale for layer, scale in layers])
        return list(F.linear(x, weight).split([layer.out_features for layer, _ in layers], dim=-1))

    @staticmethod
    def _flat(weights: Weights) -> Tensor:
        """Weights [..., *] side by side: [..., P]."""
        return torch.cat([w.flatten(weights[0].ndim - 1) for w in weights], -1)

    def _apart(self, flat: Tensor) -> Weights:
        """[B, H, P] -> views [B, H, *]."""
        gain, *matrices = apart(flat.flatten(0, 1), self.sizes)
        return [part.unflatten(0, flat.shape[:2]) for part in (gain[:, 0], *matrices)]

    @staticmethod
    def _eps(x: Tensor) -> float:
        return torch.finfo(x.dtype).eps

    @staticmethod
    def _head_norm(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (gain.to(x.dtype) + 1)

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
