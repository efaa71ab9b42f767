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
from zoo.nn.positions import RotaryConfig, rotary, rotary_table
from zoo.nn.state import Stack

_ROWS = 8  # rows that oneDNN orders a weight for; the order serves any number from 3 on


@dataclass
class _Layer:
    """A block's parts and weights as plain attributes: a lookup in a module costs as much as a small operation."""

    attention: Attention
    rope: RotaryConfig | None
    heads: int
    groups: int
    width: int
    qkv: _Matrix
    out: _Matrix
    norm1: Any
    norm2: Any
    mlp: Any
    angles: int = 0

    @staticmethod
    def of(block: Any, copy: bool) -> _Layer:
        mixer: Attention = block.mixer
        return _Layer(
            mixer, mixer.config.rope, mixer.heads, mixer.k_heads, mixer.head_dim,
            _Matrix.of(mixer.qkv, copy), _Matrix.of(mixer.out_proj, copy),
            _Norm(block.norm1), None if block.norm2 is None else _Norm(block.norm2),
            None if block.mlp is None else _Feed(block.mlp, copy),
        )  # fmt: skip


def _few(x: Tensor) -> bool:
    """Whether x [n, D] is a draft so small that the product is faster with the weights on the left (MKL)."""
    return 1 < len(x) < 8 and x.dim() == 2 and x.device.type == "cpu" and x.dtype == torch.float32


class _Matrix:
    """A weight [O, D] and, with `copy`, one copy of it in the order that is read fastest, as long as the pass lives.

    One row reads a matrix with more rows than columns up to twice as fast when its columns lie together (MKL). Several
    rows take half of MKL's time, up to some hundred of them, in the blocks that oneDNN orders the weight into; the
    first product with several rows makes them, and single rows read them from then on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, copy: bool) -> None:
        self.weight, self.bias = weight.detach(), bias
        self.copy = copy and self.weight.device.type == "cpu"
        self.blocks = self.copy and self.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.packed: Tensor | None = None
        self.columns: Tensor | None = None
        if self.copy and self.weight.shape[0] > self.weight.shape[1]:
            self.columns = self.weight.t()

    @staticmethod
    def of(linear: nn.Linear, copy: bool) -> _Matrix:
        return _Matrix(linear.weight, linear.bias, copy)

    def pack(self, x: Tensor) -> Tensor | None:
        """The weight in blocks, where x [n, D] is a reason to have it so."""
        if self.packed is None and self.blocks and len(x) > 1:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)
            self.columns = None
        return self.packed

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, D] -> [n, O]"""
        packed = self.packed if self.packed is not None else self.pack(x)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        if _few(x):
            y = (self.weight @ x.t()).t().contiguous()
        elif self.columns is not None:
            if not self.columns.is_contiguous():  # only when it is read at all
                self.columns = self.columns.contiguous()
            y = x @ self.columns
        else:
            return F.linear(x, self.weight, self.bias)
        return y if self.bias is None else y.add_(self.bias)

    def onto(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, O] + linear(y [n, D])"""
        if self.packed is not None or _few(y) or self.pack(y) is not None:
            return self(y).add_(x)
        total = torch.addmm(x, y, self.weight.t())
        return total if self.bias is None else total.add_(self.bias)


class _Norm:
    """A norm over [N, D]; the RMS norm of a single row by one dot product."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.weight = norm.weight
        eps = getattr(norm, "eps", None)
        self.eps = 0.0 if eps is None else float(eps)
        self.single = isinstance(norm, nn.RMSNorm) and eps is not None and norm.weight.device.type == "cpu"
        self.single = self.single and norm.weight.dtype in (torch.float32, torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        if self.single and len(x) == 1:
            row = x[0]
            return torch.mul(x, self.weight).mul_((float(row.dot(row)) / len(row) + self.eps) ** -0.5)
        return self.norm(x)


class _Feed:
    """x + mlp(h) for h, x [N, D]."""

    def __init__(self, mlp: Any, copy: bool) -> None:
        self.mlp = mlp
        self.gated = isinstance(mlp, GatedMLP)
        if self.gated:
            self.act = F.silu if mlp.kind == "swiglu" else F.gelu
            self.both, self.down = _Matrix.of(mlp.gate_up, copy), _Matrix.of(mlp.down, copy)

    def __call__(self, h: Tensor, x: Tensor) -> Tensor:
        if not self.gated:
            return x + self.mlp(h)
        gate, up = self.both(h).chunk(2, dim=-1)
        return self.down.onto(x, self.act(gate).mul_(up))


class LeanDecoder:
    """The lean pass of a model that `fits`.

    Args:
        model: the model.
        copy: keep a copy of the matrices in the order that is read fastest, as long as this object lives: it takes up
            to as much memory as the weights, and is worth it for some tens of passes.
    """

    def __init__(self, model: SequenceModel, copy: bool = False) -> None:
        head = model.head.weight
        self.head = _Matrix(model.embed.weight if head is None else head, model.head.bias, copy)
        self.embed = model.embed.weight
        self.norm = _Norm(model.backbone.norm)
        self.layers = [_Layer.of(block, copy) for block in model.backbone.layers]
        kinds: dict[Any, int] = {}
        for layer in self.layers:  # layers with equal angles share a table, and configs are slow to compare
            key = (layer.rope, layer.heads, layer.groups, layer.width, layer.attention.scale)
            layer.angles = kinds.setdefault(key, len(kinds))

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether all blocks are pre-norm attention with a full cache and an ordinary feed-forward network."""
        if not isinstance(model, SequenceModel) or type(model).embed_tokens is not SequenceModel.embed_tokens:
            return False
        config = model.backbone.config
        if not config.prenorm or (config.residual_in_fp32 and model.embed.weight.dtype != torch.float32):
            return False
        return all(_plain(b.mixer) and isinstance(b.mlp, MLP | GatedMLP | None) for b in model.backbone.layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, n, D] -> [B, n, V]"""
        return self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

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
            mask = _mask(layout, start, batch, n, total, ids.device, self.embed.dtype)
        tables: dict[int, tuple[Tensor, Tensor]] = {}
        x = self.embed[ids.reshape(-1)]  # [B n, D]
        for layer, state in zip(self.layers, stack.layers, strict=True):
            assert isinstance(state, KVState)
            mixer = layer.attention
            if layer.angles not in tables:
                tables[layer.angles] = _table(mixer, layout, start, batch, n, ids.device, x.dtype)
            y = _attend(layer, layer.norm1(x), state, batch, n, total, tables[layer.angles], mask, slots)
            x = layer.out.onto(x, y)
            if layer.mlp is not None:
                x = layer.mlp(layer.norm2(x), x)
            state.longest = total
            state.advance(n)
        return self.norm(x).view(batch, n, -1)


def _attend(
    layer: _Layer,
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
    heads, groups, width = layer.heads, layer.groups, layer.width
    both = heads + groups
    qkv = layer.qkv(x).view(batch, n, both + groups, width)
    old = qkv[:, :, :both]
    cos, sin = table
    turned = old * cos  # queries are scaled here as well
    if layer.rope is not None:
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
    if n == 1:  # the keys stand on the left: for a handful of queries MKL then takes half the time
        scores = (held_k @ q.view(batch, groups, per, width).transpose(-1, -2)).transpose(-1, -2)
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
