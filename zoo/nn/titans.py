"""Titans: attention over a short window beside a neural memory of everything before it (arXiv:2501.00663, §4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.memory import MemoryState, NeuralMemory, NeuralMemoryConfig, join, rest
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer, row_tail
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State


@config
class TitansConfig:
    """A Titans layer.

    Attributes:
        variant: `mac` (memory as context: each segment attends to what the memory retrieves for it), `mag` (memory as
            a gate on the attention), `mal` (memory as a layer below the attention) or `lmm` (the memory alone).
        heads: of the attention.
        window: tokens that attention sees, the own one included; for `mac` the segment, which is also the memory's
            chunk.
        persistent: learned keys and values that every token sees.
        memory: options of the memory.
    """

    variant: Literal["mac", "mag", "mal", "lmm"] = "mac"
    heads: int = 8
    window: int = 64
    persistent: int = 4
    memory: NeuralMemoryConfig = field(default_factory=NeuralMemoryConfig)


@dataclass
class WindowState(State):
    """keys, values [B, window - 1, D] of the last tokens, and how many tokens were seen [B]."""

    keys: Tensor
    values: Tensor
    seen: Tensor


@dataclass
class TitansState(State):
    """Attention's and memory's states; `held` and `seen` are the incomplete segment of `mac`."""

    memory: MemoryState | None = None
    window: WindowState | None = None
    held: Tensor | None = None
    seen: Tensor | None = None


_QUERIES = 64  # queries that share a window of keys: fewer masked pairs than with a whole window of them


class WindowAttention(nn.Module):
    """Causal attention over the last `window` tokens and some persistent keys and values."""

    def __init__(self, d_model: int, heads: int, window: int, persistent: int) -> None:
        super().__init__()
        if d_model % heads:
            raise ConfigError(f"titans needs heads that divide d_model {d_model}, got {heads}")
        self.heads, self.window = heads, window
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.persistent = nn.Parameter(torch.randn(2, persistent, d_model) * 0.02)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """q [B, Q, D] on k, v [B, K, D] and the persistent ones, where *seen* [B or 1, Q, K]."""
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        extra = self.persistent.to(k.dtype)[:, None].expand(-1, len(k), -1, -1)
        k, v = torch.cat([extra[0], k], 1), torch.cat([extra[1], v], 1)
        mask = F.pad(seen, (extra.shape[2], 0), value=True)[:, None]
        return F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask).transpose(1, 2).flatten(2)

    def mix(self, x: Tensor, count: Tensor | None, state: WindowState | None) -> tuple[Tensor, WindowState | None]:
        """Left-aligned rows x [B, L, D]; blocks of `window` queries see their own and the block before."""
        batch, length, width = x.shape
        q, (k, v) = self.q_proj(x), self.kv_proj(x).chunk(2, -1)
        after = None
        past = x.new_zeros(batch, 1)  # of the window - 1 keys before the first one, how many are real
        if state is not None:
            new = length if count is None else count
            after = WindowState(row_tail(k, state.keys, count), row_tail(v, state.values, count), state.seen + new)
            past = state.seen.clamp_max(self.window - 1)[:, None]
        size = min(self.window, length, _QUERIES)
        blocks, reach = -(-length // size), self.window - 1
        tail = blocks * size - length
        k, v = (
            torch.cat(
                [t.new_zeros(batch, reach, width) if old is None else old.to(t.dtype), F.pad(t, (0, 0, 0, tail))], 1
            )
            for t, old in (
                (k, state.keys if state is not None else None),
                (v, state.values if state is not None else None),
            )
        )
        k, v = (t.unfold(1, size + reach, size).transpose(2, 3).flatten(0, 1) for t in (k, v))  # [B·n, size + reach, D]
        q = F.pad(q, (0, 0, 0, tail)).view(batch * blocks, size, width)
        i, j = torch.arange(size, device=x.device)[:, None], torch.arange(size + reach, device=x.device)
        near = (j >= i) & (j <= i + reach)  # key j of a block stands j - reach behind its first query
        start = torch.arange(blocks, device=x.device) * size
        real = j + start[:, None] >= reach - past[:, :, None]  # [B, n, K]
        seen = near & real[:, :, None]
        y = self.attend(q, k, v, seen.expand(batch, -1, -1, -1).flatten(0, 1))
        return y.view(batch, blocks * size, width)[:, :length], after


class Titans(RowMixer):
    """x [B, L, D] -> [B, L, D], causal, constant state.

    mag: o = attention(x) · σ(memory(x)).  mal: o = attention(memory(x)).  mac: a segment S with the memory's answers
    h to it gives y = attention([persistent, h, S]); then o = y · σ(memory(y)), which also stores y. A token sees
    only the answers to tokens up to itself.

    Raises:
        ConfigError: heads or memory sizes that do not fit, or a `mac` whose memory chunk is not the window.
    """

    Config = TitansConfig

    def __init__(self, d_model: int, config: TitansConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        if config.variant == "mac" and config.memory.chunk != config.window:
            raise ConfigError(
                f"titans 'mac' needs memory.chunk equal to window {config.window}, got {config.memory.chunk}"
            )
        self.memory = NeuralMemory(d_model, config.memory, layer_index)
        self.attention: WindowAttention | None = None
        self.out_proj: nn.Linear | None = None
        if config.variant != "lmm":
            self.attention = WindowAttention(d_model, config.heads, config.window, config.persistent)
            self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="heads")

    def mix(self, x: Tensor, count: Tensor | None, state: TitansState | None) -> tuple[Tensor, TitansState | None]:
        if self.config.variant == "mac":
            return self._context(x, count, state)
        memory, window = (None, None) if state is None else (state.memory, state.window)
        m, memory = self.memory.mix(x, count, memory)
        if self.attention is None or self.out_proj is None:
            return m, (None if state is None else TitansState(memory=memory))
        y, window = self.attention.mix(m if self.config.variant == "mal" else x, count, window)
        y = y * m.sigmoid() if self.config.variant == "mag" else y
        return self.out_proj(y), (None if state is None else TitansState(memory=memory, window=window))

    def _context(self, x: Tensor, count: Tensor | None, state: TitansState | None) -> tuple[Tensor, TitansState | None]:
        """Memory as context, a segment at a time; an incomplete segment is kept and computed again when it grows."""
        size = self.config.window
        begun = self._begin(x.shape[0], x.device, work_dtype(x)) if state is None else state
        assert begun.memory is not None
        assert begun.held is not None
        assert begun.seen is not None
        rows, total, place = join(x, count, begun.held, begun.seen % size)
        memory, parts = begun.memory, []
        for start in range(0, rows.shape[1], size):
            segment = F.pad(rows[:, start : start + size], (0, 0, 0, max(0, start + size - rows.shape[1])))
            y, memory = self._segment(segment, (total - start).clamp(0, size), memory)
            parts.append(y)
        y = torch.cat(parts, 1).gather(1, place[..., None].expand_as(x)).to(x.dtype)
        if state is None:
            return y, None
        held = rest(rows, total, size).to(begun.held.dtype)
        seen = begun.seen + (x.shape[1] if count is None else count)
        return y, TitansState(memory=memory, held=held, seen=seen)

    def _segment(self, x: Tensor, count: Tensor, memory: MemoryState) -> tuple[Tensor, MemoryState]:
        assert self.attention is not None
        assert self.out_proj is not None
        size = x.shape[1]
        still = [torch.stack([w, w], 2) for w in memory.weights]  # read, but not written to, within the segment
        with torch.autocast(x.device.type, enabled=False):
            answers = self.memory.read(x.to(memory.weights[0].dtype), still).to(x.dtype)
        k, v = self.attention.kv_proj(torch.cat([answers, x], 1)).chunk(2, -1)
        causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        y = self.attention.attend(self.attention.q_proj(x), k, v, torch.cat([causal, causal], 1)[None])
        y = self.out_proj(y)
        read, weights, momentum, base = self.memory.run(y, count, memory)
        full = count == size
        seen = memory.seen + full * size
        return y * read.to(y.dtype).sigmoid(), MemoryState(weights, momentum, base, memory.held, seen)

    def _begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> TitansState:
        memory, size = self.memory.begin(batch, device, dtype), self.config.window
        zeros = lambda n: torch.zeros(batch, n, self.d_model, device=device, dtype=dtype)
        seen = torch.zeros(batch, dtype=torch.long, device=device)
        if self.config.variant == "mac":
            memory.held = zeros(0)  # the layer itself keeps what is not complete
            return TitansState(memory=memory, held=zeros(size - 1), seen=seen)
        window = None if self.attention is None else WindowState(zeros(size - 1), zeros(size - 1), seen)
        return TitansState(memory=memory, window=window)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TitansState:
        """The state before any token: constant in max_len."""
        state = self._begin(batch, device, dtype if dtype == torch.float64 else torch.float32)
        return state.detach()._map(torch.Tensor.contiguous)

    def cost(self, length: int, batch: int = 1) -> Cost:
        cfg, memory = self.config, self.memory.cost(length, batch)
        flops, state = memory.flops, memory.state_bytes
        if self.attention is not None:
            keys = cfg.persistent + (2 * cfg.window if cfg.variant == "mac" else cfg.window)
            weights = 4 * self.d_model**2
            flops += batch * length * (2 * weights + 4 * keys * self.d_model)
            kept = (cfg.window - 1) * self.d_model
            state += batch * (8 if cfg.variant == "mac" else 4 * 2 * kept + 8)
        return Cost(flops=float(flops), state_bytes=state)
