"""The transformer block of the image models, with the options their published weights need.

One class serves TiTok, U-ViT, RAR, FlexTok and SEED: they differ in biases, in norms of queries and keys, in the
attention's scale and in whether norms are modulated by a condition (adaLN-zero: Peebles and Xie 2022, DiT, arXiv
2212.09748, figure 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import config
from zoo.nn.mlp import MLPConfig, make_mlp
from zoo.nn.state import State


@config
class ViTConfig:
    """A stack of equal blocks.

    Attributes:
        width: of the tokens.
        layers: number of blocks.
        heads: attention heads.
        mlp: feed-forward network.
        qkv_bias: `all`, `none`, or `qv` (no bias on keys: EVA-CLIP).
        out_bias: bias of the attention's output projection.
        qk_norm: `none`, `affine` (layer norm of each head's queries and keys with gain and bias: RAR) or `plain`
            (without: FlexTok).
        scale: of the attention logits, None for 1 / sqrt(head width); FlexTok's weights need 8 / head width (muP).
        norm_affine: gains and biases in the block norms.
        eps: of the block norms; qk_eps of the query and key norms.
        prenorm: norm before each sub-layer; False: after each residual sum (BERT).
        adaln: modulate norms and gate residuals by a condition.
        adaln_groups: conditions of which each covers one run of tokens (FlexTok: patches and registers).
        dropout: on each sub-layer's output; attn_dropout on attention weights.
    """

    width: int = 512
    layers: int = 8
    heads: int = 8
    mlp: MLPConfig = field(default_factory=lambda: MLPConfig(kind="gelu", width=2048))
    qkv_bias: Literal["all", "none", "qv"] = "all"
    out_bias: bool = True
    qk_norm: Literal["none", "affine", "plain"] = "none"
    scale: float | None = None
    norm_affine: bool = True
    eps: float = 1e-5
    qk_eps: float = 1e-5
    prenorm: bool = True
    adaln: bool = False
    adaln_groups: int = 1
    dropout: float = 0.0
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible into {self.heads} heads")


@dataclass
class KVCache(State):
    """Keys and values of the tokens so far.

    Attributes:
        k, v: [B, H, max_len, D / H]; only the first `length` positions hold something.
        length: tokens consumed.
    """

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens and return all so far."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass(frozen=True)
class Mask:
    """Who sees whom in a stack of image blocks.

    Attributes:
        kind: `full`; `causal`; `prefix`: the first `prefix` tokens see each other and nothing else, the rest see
            the prefix and causally each other (FlexTok's registers); or `dense`.
        prefix: see above.
        dense: bool [B or 1, 1, L, L], True where the query (row) sees the key.
    """

    kind: Literal["full", "causal", "prefix", "dense"] = "full"
    prefix: int = 0
    dense: Tensor | None = None


FULL = Mask()
CAUSAL = Mask("causal")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.scale, self.attn_dropout = config.heads, config.scale, config.attn_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias == "all")
        self.q_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias == "qv" else None
        affine = config.qk_norm == "affine"
        shape = width // config.heads
        self.q_norm = nn.LayerNorm(shape, config.qk_eps, affine) if config.qk_norm != "none" else nn.Identity()
        self.k_norm = nn.LayerNorm(shape, config.qk_eps, affine) if config.qk_norm != "none" else nn.Identity()
        self.out_proj = nn.Linear(width, width, bias=config.out_bias)

    def forward(self, x: Tensor, mask: Mask = FULL, cache: KVCache | None = None) -> Tensor:
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        q, k = self.q_norm(q), self.k_norm(k)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask, past, self.attn_dropout if self.training else 0.0, self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, past: int = 0, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention of [B, H, L, d] under *mask*; keys start *past* positions before the queries."""
    sdpa = F.scaled_dot_product_attention
    if mask.kind == "dense":
        return sdpa(q, k, v, attn_mask=mask.dense, dropout_p=dropout, scale=scale)
    if mask.kind == "prefix" and mask.prefix:  # two calls: the prefix needs no mask and its rows skip the other keys
        n, length = mask.prefix, q.shape[2]
        first = sdpa(q[:, :, :n], k[:, :, :n], v[:, :, :n], dropout_p=dropout, scale=scale)
        if length == n:
            return first
        seen = torch.ones(length - n, length, dtype=torch.bool, device=q.device).tril(n)
        return torch.cat([first, sdpa(q[:, :, n:], k, v, attn_mask=seen, dropout_p=dropout, scale=scale)], 2)
    causal = mask.kind in ("causal", "prefix")
    if not causal or q.shape[2] == 1:
        return sdpa(q, k, v, dropout_p=dropout, scale=scale)
    if not past:
        return sdpa(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return sdpa(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale)


class Modulation(nn.Module):
    """SiLU and a linear layer: condition -> *chunks* vectors of the width, all zero before training (adaLN-zero)."""

    def __init__(self, width: int, chunks: int, groups: int = 1) -> None:
        super().__init__()
        self.chunks, self.groups = chunks, groups
        self.proj = nn.Linear(width, groups * chunks * width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, condition: Tensor, sizes: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        """condition [B, D] or [B, L, D] -> chunks of [B, 1 or L, D]; *sizes* are the lengths of the groups' runs."""
        values = self.proj(F.silu(condition))
        if condition.ndim == 2:
            values = values.unflatten(-1, (self.groups, -1))  # [B, groups, chunks · D]
        parts = values.chunk(self.chunks, dim=-1)
        if self.groups == 1:
            return parts
        assert sizes is not None
        runs = torch.tensor(sizes, device=values.device)
        return tuple(part.repeat_interleave(runs, dim=1, output_size=sum(sizes)) for part in parts)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class ViTBlock(nn.Module):
    """x -> x + attention(norm(x)) -> x + mlp(norm(x)), [B, L, D]; chunks of the modulation in DiT's order."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.norm1 = nn.LayerNorm(config.width, config.eps, config.norm_affine)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps, config.norm_affine)
        self.mlp = make_mlp(config.width, config.mlp)
        self.modulation = Modulation(config.width, 6, config.adaln_groups) if config.adaln else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Mask = FULL,
        condition: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if self.modulation is not None:
            assert condition is not None
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition, sizes)
            x = x + gate1 * self.dropout(self.attn(modulate(self.norm1(x), shift1, scale1), mask, cache))
            return x + gate2 * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))
        if self.prenorm:
            x = x + self.dropout(self.attn(self.norm1(x), mask, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attn(x, mask, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class ViT(nn.Module):
    """The blocks in order. Embeddings, first and last norms stand outside."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.layers))
        self.grad_checkpointing = False

    def forward(
        self,
        x: Tensor,
        mask: Mask = FULL,
        condition: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """x [B, L, D]; *condition* and *sizes* as `Modulation` takes them; *caches* (one a block) are continued."""
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and self.training and caches is None:
                x = checkpoint(block, x, mask, condition, sizes, use_reentrant=False)
            else:
                x = block(x, mask, condition, sizes, caches[i] if caches is not None else None)
        return x

    def init_caches(self, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> list[KVCache]:
        """Empty caches for decoding, one a block."""
        c = self.config
        shape = (batch, c.heads, max_len, c.width // c.heads)
        make = lambda: torch.zeros(shape, device=device, dtype=dtype)
        return [KVCache(make(), make()) for _ in self.blocks]
