"""Softmax attention: many, grouped or one key head, keys and values of unlike number and width, rotary or ALiBi.

Vaswani et al. 2017, arXiv:1706.03762, §3.2; grouped queries: arXiv:2305.13245; differently compressed queries, keys
and values (DiffQKV): Lin et al. 2025, arXiv:2501.13629, §2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError, ZooError
from zoo.nn.kernels import lift_heads, sdpa, shared
from zoo.nn.kv import KVState, RingState
from zoo.nn.layout import Layout
from zoo.nn.masks import attend, attend_padding
from zoo.nn.mixer import Cost, Mixer, MixerInfo
from zoo.nn.policy import PolicyState
from zoo.nn.positions import RotaryConfig, alibi_slopes, rotary, rotary_table, rotate
from zoo.nn.visibility import Continuation, column, depth

_KINDS = frozenset({"causal", "full", "prefix", "block_causal", "window"})


@config
class AttentionConfig:
    """Options of an attention mixer.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads, a divisor of heads; 0 takes heads.
        v_heads: value heads where they differ from the key heads (DiffQKV); 0 takes kv_heads.
        head_dim: width of a query head; 0 takes d_model / heads. May exceed it (augmented queries).
        k_dim: width of a cached key head; 0 takes head_dim. Where it differs, a linear map a head lifts keys to it.
        v_dim: width of a value head; 0 takes head_dim.
        bias: of the fused projection of queries, keys and values.
        out_bias: of the output projection.
        qk_norm: RMS norm of each head's queries and keys, before the rotation.
        rope: rotary embedding, None for none.
        alibi: add -slope · distance to the logits (symmetric where keys lie to the right).
        window: tokens seen to the left beside the own one (and as many to the right under a `full` layout), None for
            all. Layers with and without make a mixed-span stack (MASFormer).
        sinks: with `window`: the first tokens, which stay visible (StreamingLLM).
        scale: of the logits, None for 1 / sqrt(head_dim).
        dropout: on the attention weights.
        eps: of the query and key norms.
        pad_queries: `skip` puts out 0 at padding. Otherwise padded positions attend to the valid ones of their past,
            and where there is none to all equally (`eager`) or to nothing (`sdpa`), as transformers' implementations
            of those names do; only for the parity of outputs at padding.
    """

    heads: int = 8
    kv_heads: int = 0
    v_heads: int = 0
    head_dim: int = 0
    k_dim: int = 0
    v_dim: int = 0
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    rope: RotaryConfig | None = None
    alibi: bool = False
    window: int | None = None
    sinks: int = 0
    scale: float | None = None
    dropout: float = 0.0
    eps: float = 1e-6
    pad_queries: Literal["skip", "eager", "sdpa"] = "skip"

    def __post_init__(self) -> None:
        keys = self.kv_heads or self.heads
        values = self.v_heads or keys
        if self.heads % keys or self.heads % values or max(keys, values) % min(keys, values):
            raise ValueError(
                f"{self.heads} query heads, {keys} key heads and {values} value heads must divide one another"
            )
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if self.sinks and self.window is None:
            raise ValueError("sinks need a window: without one every token stays visible")


class Attention(Mixer):
    """Multi-head attention with one fused projection. x [B, L, D] -> [B, L, D].

    Raises:
        ConfigError: d_model is not a multiple of heads and head_dim is not given, or rope does not fit the head.
    """

    Config = AttentionConfig

    def __init__(self, d_model: int, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__()
        if not config.head_dim and d_model % config.heads:
            raise ConfigError(f"attention: d_model {d_model} is not divisible into {config.heads} heads; give head_dim")
        self.config = config
        self.heads = config.heads
        self.k_heads = config.kv_heads or config.heads
        self.v_heads = config.v_heads or self.k_heads
        self.head_dim = config.head_dim or d_model // config.heads
        self.k_dim = config.k_dim or self.head_dim
        self.v_dim = config.v_dim or self.head_dim
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.widths = [self.heads * self.head_dim, self.k_heads * self.k_dim, self.v_heads * self.v_dim]
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=config.bias)
        self.out_proj = nn.Linear(self.heads * self.v_dim, d_model, bias=config.out_bias)
        self.k_lift: nn.Parameter | None = None
        if self.k_dim != self.head_dim:
            bound = self.k_dim**-0.5
            self.k_lift = nn.Parameter(torch.empty(self.k_heads, self.k_dim, self.head_dim).uniform_(-bound, bound))
        self.q_norm = nn.RMSNorm(self.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.eps) if config.qk_norm else None
        self.rotary_dim = (config.rope.dim or self.head_dim) if config.rope is not None else 0
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ConfigError(
                f"attention: rope turns {self.rotary_dim} channels, which must be even and at most {self.head_dim}"
            )
        self.slopes = alibi_slopes(config.heads) if config.alibi else None
        narrow = config.window is not None
        self.info = MixerInfo(
            layouts=frozenset({"causal", "full"}) if narrow else _KINDS,
            step="constant" if narrow else "linear",
            receptive_field=config.window if not config.sinks else None,
            packing=True,
            split="heads",
        )

    def forward(self, x: Tensor, layout: Layout, state: Any = None) -> tuple[Tensor, Any]:
        """Mix x [B, L, D] along L.

        A layout with `parent` is a draft: its tokens are stored after the others, and the state's `commit` says which
        of them stay; until then nothing else may be put in.

        Raises:
            ZooError: packed documents together with a state, or more tokens than the state was made for.
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k = k.unflatten(-1, (self.k_heads, self.k_dim))
        v = v.unflatten(-1, (self.v_heads, self.v_dim))  # [B, L, H, d]
        if self.q_norm is not None:
            q = self.q_norm(q)
        if state is None:
            angles = self._angles(layout, batch, length, x.device, None, None)
            q, k = self._turn(q, angles), self._keys(k, angles)
            y = self._attend(q, k, v, self._spanned(layout))
        else:
            y = self._continue(q, k, v, layout, state)
        y = self.out_proj(y.flatten(2))
        if layout.valid is not None and self.config.pad_queries == "skip":
            y = y.masked_fill(~layout.valid[..., None], 0)
        return y, state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Whole sequences: [B, L, H, d] -> [B, L, H, d_v]."""
        dropout = self.config.dropout if self.training else 0.0
        if self.config.pad_queries != "skip" and layout.valid is not None:
            return attend_padding(q, k, v, layout, self.scale, self.slopes, dropout, self.config.pad_queries == "eager")
        return attend(q, k, v, layout, self.scale, self.slopes, dropout)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, n, H, d] over cached k [B, H_k, S, d], v [B, H_v, S, d_v] where mask [B or 1, H or 1, n, S]."""
        n = q.shape[1]
        groups = max(k.shape[1], v.shape[1])
        k, v = lift_heads(k, groups).to(q.dtype), lift_heads(v, groups).to(q.dtype)
        # query heads of one group are further queries of its key head, so that keys are not repeated
        per = self.heads // groups
        q = q.unflatten(2, (groups, per)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, per n, d]
        if mask is not None and mask.shape[1] == self.heads and self.heads > 1:
            mask = mask.unflatten(1, (groups, per)).flatten(2, 3)
        elif mask is not None:
            mask = mask.repeat(1, 1, per, 1) if n > 1 else mask
        y = sdpa(q, k, v, mask, False, self.scale, self.config.dropout if self.training else 0.0)
        return y.unflatten(2, (per, n)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, n, H, d_v]

    # --- positions

    def _spanned(self, layout: Layout) -> Layout:
        """The layout narrowed to this layer's own window."""
        cfg = self.config
        if cfg.window is None:
            return layout
        reach = (cfg.window, 0 if layout.kind == "causal" else cfg.window)
        return shared(
            layout, ("span", reach, cfg.sinks), lambda: layout.with_(kind="window", window=reach, sinks=cfg.sinks)
        )

    def _angles(
        self,
        layout: Layout,
        batch: int,
        length: int,
        device: torch.device,
        start: int | Tensor | None,
        slots: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the new tokens, [L, n] or [B, L, n], which follow *start* others at *slots*."""
        rope = self.config.rope
        if rope is None:
            return None
        if layout.position is not None:
            position = layout.position
            return shared(
                layout, ("given", rope, self.rotary_dim), lambda: rotary(rope, self.rotary_dim, position), position
            )
        plain = layout.valid is None and layout.segment is None and layout.parent is None
        if plain and (start is None or isinstance(start, int)):
            first = start or 0
            cos, sin = rotary_table(rope, self.rotary_dim, first + length, device)
            return cos[first : first + length], sin[first : first + length]

        def build() -> tuple[Tensor, Tensor]:
            if layout.parent is not None:
                position = depth(layout, batch, length, device) + column(0 if start is None else start)
            elif slots is not None:
                position = slots
            else:
                position = layout.positions(batch, length, device)
            return rotary(rope, self.rotary_dim, position)

        first_place = start if not isinstance(start, Tensor) else None
        key = ("angles", rope, self.rotary_dim, length, first_place)
        return shared(layout, key, build, start if isinstance(start, Tensor) else None)

    def _turn(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        if angles is None or self.config.rope is None:
            return x
        return rotate(x, angles[0], angles[1], self.config.rope.interleaved)

    def _keys(self, k: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Keys as queries meet them: lifted, normed, turned. [B, L, H_k, k_dim] -> [B, L, H_k, head_dim]."""
        if self.k_lift is not None:
            k = torch.einsum("blhc,hcd->blhd", k, self.k_lift)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return self._turn(k, angles)

    # --- decoding

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: KVState | RingState | PolicyState
    ) -> Tensor:
        """Attend from new tokens to what the state holds and to each other, and store them."""
        if layout.segment is not None:
            raise ZooError(
                "Attention got packed documents (Layout.segment) and a carried state; "
                "prefill each document as its own row of the batch"
            )
        if isinstance(state, PolicyState):
            return state.attend(self, q, self._keys(k, None), v, layout)
        batch, length = q.shape[:2]
        device, valid, draft = q.device, layout.valid, layout.parent is not None
        if self.k_lift is not None and layout.position is not None:
            raise ZooError("Attention with k_dim caches unturned keys and cannot decode with given positions")
        before = state.length
        slots = state.slots(length, valid, device)
        angles = self._angles(layout, batch, length, device, before, slots)
        q = self._turn(q, angles)
        if self.k_lift is None:
            k = self._keys(k, angles)
        count = None if valid is None else shared(layout, "count", lambda: valid.sum(1))
        first = isinstance(before, int) and before == 0 and layout.kind in ("causal", "full", "window")
        if isinstance(state, RingState):
            y = self._ring(q, k, v, layout, state, slots, valid, count, first and not draft)
        else:
            state.append(k, v, slots, valid, count)
            if first and not draft:
                whole = k if self.k_lift is None else self._keys(k, angles)
                y = self._attend(q, whole, v, self._spanned(layout))
            else:
                after = Continuation(layout, before, slots, state.longest, batch)
                held_k, held_v = state.k[:, :, : state.longest], state.v[:, :, : state.longest]
                if self.k_lift is not None:
                    held_k = self._lifted(held_k, after.key_position)
                mask = after.mask(self.config.window, self.config.sinks, self.slopes, q.dtype)
                y = self._weigh(q, held_k, held_v, mask)
        if not (isinstance(state, RingState) and draft):
            by = length if count is None else count
            state.advance(by)
            if isinstance(state.length, Tensor):  # one tensor for all layers lets them share masks and angles
                total = state.length
                key = ("length", length, before if isinstance(before, int) else None)
                state.length = shared(layout, key, lambda: total, before if isinstance(before, Tensor) else None)
        return y

    def _ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        state: RingState,
        slots: Tensor,
        valid: Tensor | None,
        count: Tensor | None,
        first: bool,
    ) -> Tensor:
        batch, length = q.shape[:2]
        before = state.length
        if layout.parent is not None:
            state.pending_k, state.pending_v = k, v
        if first:
            angles = self._angles(layout, batch, length, q.device, before, slots)
            whole = k if self.k_lift is None else self._keys(k, angles)
            y = self._attend(q, whole, v, self._spanned(layout))
            state.append(k, v, slots, valid, count)
            return y
        if length == 1 and isinstance(before, int) and valid is None and layout.parent is None:
            state.append(k, v, slots, valid, count)
            used = min(before + 1, state.capacity)
            position = RingState(state.k, state.v, state.sinks, before + 1).held()[:, :used]
            after = Continuation(layout, before, slots, used, batch, position)
            mask = after.bias(self.slopes, None, q.dtype) if self.slopes is not None else None
            return self._weigh(q, self._lifted(state.k[:, :, :used], position), state.v[:, :, :used], mask)
        held = state.held().expand(batch if isinstance(before, Tensor) else 1, -1)
        where = Continuation(layout, before, slots, length, batch).where
        where = where.expand(max(len(where), len(held)), -1)
        position = torch.cat([held.expand(len(where), -1), where], dim=1)
        held_k = torch.cat([state.k, k.transpose(1, 2).to(state.k.dtype)], dim=2)
        held_v = torch.cat([state.v, v.transpose(1, 2).to(state.v.dtype)], dim=2)
        after = Continuation(layout, before, slots, held_k.shape[2], batch, position)
        mask = after.mask(self.config.window, self.config.sinks, self.slopes, q.dtype)
        y = self._weigh(q, self._lifted(held_k, position), held_v, mask)
        if layout.parent is None:
            state.append(k, v, slots, valid, count)
        return y

    def _lifted(self, k: Tensor, position: Tensor) -> Tensor:
        """Cached keys [B, H_k, S, k_dim] of tokens at position [S] or [B, S], as queries meet them."""
        if self.k_lift is None:
            return k
        angles = None
        if self.config.rope is not None:
            angles = rotary(self.config.rope, self.rotary_dim, position)
        return self._keys(k.transpose(1, 2).to(self.k_lift.dtype), angles).transpose(1, 2)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVState | RingState:
        """An empty cache of max_len tokens, or of the window and sinks where those are fewer."""
        size = self._held(max_len)
        k = torch.zeros(batch, self.k_heads, size, self.k_dim, device=device, dtype=dtype)
        v = torch.zeros(batch, self.v_heads, size, self.v_dim, device=device, dtype=dtype)
        return RingState(k, v, self.config.sinks) if size < max_len else KVState(k, v)

    def _held(self, length: int) -> int:
        window = self.config.window
        return length if window is None else min(length, window + 1 + self.config.sinks)

    def cost(self, length: int, batch: int = 1) -> Cost:
        projections = 2 * (self.qkv.weight.numel() + self.out_proj.weight.numel())
        mixing = 2 * self.heads * (self.head_dim + self.v_dim) * self._held(length)
        return Cost(
            flops=float(batch * length * (projections + mixing)),
            state_bytes=4 * batch * self._held(length) * (self.k_heads * self.k_dim + self.v_heads * self.v_dim),
        )
