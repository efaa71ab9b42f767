"""The transformer blocks of OmniTokenizer: attention within a frame, within windows of it, and along time.

Wang et al. 2024, OmniTokenizer, arXiv:2406.09399, section 3.1. What the released weights were trained with, and what
therefore stands here: only queries see the layer norm, logits are 8 · cosine, the relative bias that the paper speaks
of is stored but not applied, and the positional convolution of the temporal blocks reads (space, time) as if it were
(time, space), so that it mixes both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOGIT_SCALE = 8.0


class GainNorm(nn.Module):
    """Layer norm with a learned gain; the shift is a constant of the weights' file."""

    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class PositionConv(nn.Module):
    """A depthwise 3x3x3 convolution over [B, T, H, W, D], zero-padded; causal in time where asked."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, groups=width)
        self.pad = (1, 1, 1, 1, 2, 0) if causal else (1, 1, 1, 1, 1, 1)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """x of any shape whose entries in order are those of *shape* + (D,)."""
        grid = x.reshape(*shape, x.shape[-1]).movedim(-1, 1)
        return self.conv(F.pad(grid, self.pad)).movedim(1, -1).reshape(x.shape)


class StoredBias(nn.Module):
    """The network of a continuous relative bias (Liu et al. 2022, arXiv:2111.09883) of the files; nobody reads it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, heads))
        self.requires_grad_(False)


def axial_rotations(count: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """[count, width / 2] complex rotations of a square grid in raster order; pairs turn by column and row in turn."""
    side = int(count**0.5)
    place = torch.arange(count, device=device)
    speed = 10000.0 ** -(torch.arange(0, width, 4, device=device)[: width // 4].float() / width)
    angle = torch.stack([(place % side)[:, None] * speed, (place // side)[:, None] * speed], -1).flatten(1)
    return torch.polar(torch.ones_like(angle), angle)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """[..., L, d] rotated by [L, d / 2] complex numbers, neighbours forming pairs."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


class CosineAttention(nn.Module):
    """x [N, L, D] -> [N, L, D]; queries from the normed x, keys and values from x itself.

    Args:
        width, heads, head_dim: sizes.
        rotary: turn queries and keys by their place on a square grid.
        causal: see earlier places alone.
        stored_bias: hold the unused bias network.
    """

    def __init__(self, width: int, heads: int, head_dim: int, rotary: bool, causal: bool, stored_bias: bool) -> None:
        super().__init__()
        self.heads, self.rotary, self.causal = heads, rotary, causal
        self.norm = GainNorm(width)
        # of a cross-attention that no published model has
        self.context_norm = GainNorm(width).requires_grad_(False)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.ones(head_dim))
        self.stored_bias = StoredBias(width, heads) if stored_bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(self.norm(x)), *self.kv(x).chunk(2, -1))
        )  # [N, H, L, d]
        if self.rotary:
            turn = axial_rotations(x.shape[1], q.shape[-1], x.device)
            q, k = (turned(t, turn) for t in (q, k))
        q = F.normalize(q, dim=-1).to(v.dtype) * self.q_scale
        k = F.normalize(k, dim=-1).to(v.dtype) * self.k_scale
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=_LOGIT_SCALE)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def window_places(window: int) -> Tensor:
    """[w², w²] row of the bias table for each pair of places in a window."""
    grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    apart = grid[:, :, None] - grid[:, None] + window - 1  # [2, w², w²]
    return apart[0] * (2 * window - 1) + apart[1]


class WindowAttention(nn.Module):
    """Attention within squares of *window* places, with a table of biases (Liu et al. 2021, arXiv:2103.14030)."""

    places: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = GainNorm(width)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.register_buffer("places", window_places(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        w, tiles = self.window, int(length**0.5) // self.window
        x = self.norm(x).reshape(batch, tiles, w, tiles, w, width).transpose(2, 3).reshape(-1, w * w, width)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.places].permute(2, 0, 1).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        y = self.proj(y).reshape(batch, tiles, tiles, w, w, width)
        return y.transpose(2, 3).reshape(batch, length, width)


class GatedFeedForward(nn.Module):
    """Layer norm, GEGLU (Shazeer 2020, arXiv:2002.05202), linear; the second half of the first map is the gate."""

    def __init__(self, width: int, mult: float) -> None:
        super().__init__()
        inner = int(mult * (2 / 3) * width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, -1)
        return self.down(F.gelu(gate) * value)


class OmniBlock(nn.Module):
    """x + position, + attention, + feed-forward; window blocks (kind `w`) have no positional convolution."""

    def __init__(self, kind: str, width: int, heads: int, head_dim: int, *, mult: float, window: int, rotary: bool,
                 causal: bool, causal_position: bool, stored_bias: bool) -> None:  # fmt: skip
        super().__init__()
        self.position = PositionConv(width, causal_position) if kind == "t" else None
        self.attention = (
            CosineAttention(width, heads, head_dim, rotary, causal, stored_bias)
            if kind == "t"
            else WindowAttention(width, heads, window)
        )
        self.mlp = GatedFeedForward(width, mult)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        if self.position is not None:
            x = x + self.position(x, shape)
        x = x + self.attention(x)
        return x + self.mlp(x)
