"""A decoder's forward pass for a few tokens after a full cache, with as few tensor operations as it can be written.

With one token a layer the matrices are read once, and what remains is the price of each operation's dispatch: a third
of the step at 26M parameters. It computes what the modules compute, on the same weights and the same `KVState`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models.base import SequenceModel
from zoo.nn.attention import Attention
from zoo.nn.kv import KVState, store
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLP, GatedMLP
from zoo.nn.positions import rotary, rotary_table
from zoo.nn.state import Stack


@dataclass
class _Layer:
    attention: Attention
    norm1: nn.Module
    norm2: nn.Module | None
    mlp: Any


class LeanDecoder:
    """The lean pass of a model that `fits`."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model
        self.layers = [_Layer(b.mixer, b.norm1, b.norm2, b.mlp) for b in model.backbone.layers]  # type: ignore[arg-type]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether all blocks are pre-norm attention with a full cache and an ordinary feed-forward network."""
        if not isinstance(model, SequenceModel) or type(model).embed_tokens is not SequenceModel.embed_tokens:
            return False
        config = model.backbone.config
        if not config.prenorm or (config.residual_in_fp32 and model.embed.weight.dtype != torch.float32):
            return False
        return all(_plain(b.mixer) and isinstance(b.mlp, MLP | GatedMLP | None) for b in model.backbone.layers)

    def __call__(self, ids: Tensor, stack: Stack, parent: Tensor | None = None) -> Tensor:
        """ids [B, n] after what *stack* holds -> hidden [B, n, D]; with *parent* [B, n] they are a draft's tree.

        Raises:
            ZooError: more tokens than the cache has room for.
        """
        batch, n = ids.shape
        first = stack.layers[0]
        assert isinstance(first, KVState)
        start, total = first.length, first.longest + n
        if total > first.capacity:
            raise ZooError(f"the cache holds at most {first.capacity} tokens, but {total} were put in")
        uniform = isinstance(start, int)
        layout = Layout("causal", parent=parent)
        slots = None if uniform and parent is None else _slots(start, n, ids.device)
        mask = None
        if n > 1 or not uniform:
            mask = _mask(layout, start, batch, n, total, ids.device, self.model.embed.weight.dtype)
        tables: dict[Any, tuple[Tensor, Tensor]] = {}
        x = self.model.embed(ids).view(batch * n, -1)  # [B n, D]
        for layer, state in zip(self.layers, stack.layers, strict=True):
            assert isinstance(state, KVState)
            mixer = layer.attention
            key = (mixer.config.rope, mixer.heads, mixer.k_heads, mixer.head_dim, mixer.scale)
            if key not in tables:
                tables[key] = _table(mixer, layout, start, batch, n, ids.device, x.dtype)
            y = self._attend(mixer, _norm(layer.norm1, x), state, batch, n, total, tables[key], mask, slots)
            x = _project(mixer.out_proj, y, x)
            if layer.norm2 is not None:
                x = _feed(layer.mlp, _norm(layer.norm2, x), x)
            state.longest = total
            state.advance(n)
        return _norm(self.model.backbone.norm, x).view(batch, n, -1)

    def _attend(
        self,
        mixer: Attention,
        x: Tensor,
        state: KVState,
        batch: int,
        n: int,
        total: int,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        slots: Tensor | None,
    ) -> Tensor:
        """x [B n, D] -> [B n, H d]"""
        heads, groups, width = mixer.heads, mixer.k_heads, mixer.head_dim
        both = heads + groups
        qkv = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).view(batch, n, both + groups, width)
        old = qkv[:, :, :both]
        cos, sin = table
        turned = old * cos  # queries are scaled here as well
        if mixer.config.rope is not None:
            half = width // 2
            turned[..., :half].addcmul_(old[..., half:], sin, value=-1)
            turned[..., half:].addcmul_(old[..., :half], sin)
        q, k, v = turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, both:]
        if isinstance(state.length, int):
            state.k[:, :, total - n : total] = k.transpose(1, 2)
            state.v[:, :, total - n : total] = v.transpose(1, 2)
        else:
            assert slots is not None
            store(state.k, k, slots, None)
            store(state.v, v, slots, None)
        held_k, held_v = state.k[:, :, :total], state.v[:, :, :total]
        per = heads // groups
        if n == 1:
            q = q.view(batch, groups, per, width)
        else:
            q = q.unflatten(2, (groups, per)).permute(0, 2, 3, 1, 4).reshape(batch, groups, per * n, width)
        scores = q @ held_k.transpose(-1, -2)  # [B, G, per n, S]
        if mask is not None:
            scores.view(batch, groups, per, n, total).add_(mask)
        y = torch.softmax(scores, -1) @ held_v
        if n > 1:
            y = y.view(batch, groups, per, n, width).permute(0, 3, 1, 2, 4)
        return y.reshape(batch * n, heads * width)


def _plain(mixer: Any) -> bool:
    if not isinstance(mixer, Attention):
        return False
    cfg = mixer.config
    simple = cfg.window is None and not cfg.qk_norm and not cfg.alibi and mixer.k_lift is None
    same = mixer.v_heads == mixer.k_heads and mixer.v_dim == mixer.head_dim == mixer.k_dim
    turned = cfg.rope is None or (mixer.rotary_dim == mixer.head_dim and not cfg.rope.interleaved and not cfg.rope.axes)
    return simple and same and turned


def _norm(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm(x)


def _project(linear: nn.Linear, y: Tensor, x: Tensor) -> Tensor:
    """x + linear(y)"""
    total = torch.addmm(x, y, linear.weight.t())
    return total if linear.bias is None else total.add_(linear.bias)


def _feed(mlp: Any, h: Tensor, x: Tensor) -> Tensor:
    """x + mlp(h)"""
    if isinstance(mlp, GatedMLP):
        both = F.linear(h, mlp.gate_up.weight, mlp.gate_up.bias)
        gate, up = both.chunk(2, dim=-1)
        gate = F.silu(gate) if mlp.kind == "swiglu" else F.gelu(gate)
        return _project(mlp.down, gate.mul_(up), x)
    return x + mlp(h)


def _slots(start: int | Tensor, n: int, device: torch.device) -> Tensor:
    steps = torch.arange(n, device=device)[None]
    return steps + (start[:, None] if isinstance(start, Tensor) else start)


def _depth(layout: Layout, batch: int, n: int, device: torch.device) -> Tensor:
    """[B, n] generations below the committed tokens."""
    return layout.dense(n, batch, device).sum(-1) - 1


def _mask(
    layout: Layout, start: int | Tensor, batch: int, n: int, total: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[B or 1, 1, 1, n, S] 0 where a new token sees a held one, -inf elsewhere."""
    first = start.view(-1, 1, 1) if isinstance(start, Tensor) else start
    inside = torch.arange(total, device=device)[None, None] - first  # [B or 1, 1, S]
    tree = layout.dense(n, batch, device)
    index = inside.clamp(0, n - 1).expand(batch, n, total)
    seen = (inside < 0) | ((inside < n) & tree.gather(2, index))
    blank = torch.zeros(seen.shape, dtype=dtype, device=device)
    return blank.masked_fill_(~seen, float("-inf"))[:, None, None]


def _table(
    mixer: Attention, layout: Layout, start: int | Tensor, batch: int, n: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines [B or 1, n, H + G, d] and sines [.., d / 2]; those of queries carry the scale."""
    both = mixer.heads + mixer.k_heads
    gain = torch.ones(both, 1, device=device)
    gain[: mixer.heads] = mixer.scale
    rope = mixer.config.rope
    if rope is None:
        return gain.to(dtype), gain
    if isinstance(start, int) and layout.parent is None:
        cos, sin = rotary_table(rope, mixer.rotary_dim, start + n, device)
        cos, sin = cos[None, start : start + n], sin[None, start : start + n]
    else:
        steps = _depth(layout, batch, n, device) if layout.parent is not None else torch.arange(n, device=device)[None]
        position = steps + (start[:, None] if isinstance(start, Tensor) else start)
        cos, sin = rotary(rope, mixer.rotary_dim, position)
    cos, sin = cos[:, :, None] * gain, sin[:, :, None] * gain
    return torch.cat([cos, cos], -1).to(dtype), sin.to(dtype)
