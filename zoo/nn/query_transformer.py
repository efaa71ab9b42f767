"""The Matryoshka Query Transformer: any number m <= M of visual tokens, the first m of one ordered set.

Hu et al. 2024, "Matryoshka Query Transformer for Large Vision-Language Models", arXiv:2405.19315, §3.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn.elastic import sample_keep


@config
class QueryTransformerConfig:
    """The defaults are those of MQT-LLaVA-7B.

    Attributes:
        grid: M = grid² learned queries.
        width: of the picture's features and of the queries.
        out_width: of the tokens, the language model's width.
        heads: attention heads.
        source: (rows, columns) of the picture's features.
        keys: `position+content`, or `position` alone: the released weights need it, their keys hold no content, so
            that every picture is read with the same attention weights.
        train_positions: let the position table learn; it stands still in the constructor of the official code.
        law: how training draws m, one number a step for the whole batch: `even` (uniform over the even numbers up to
            M, as the official code does), `uniform`, `pow2`, `uniform_pow2` (see `zoo.nn.elastic`) or `all` (m = M).
        eps: of the norms.
    """

    grid: int = 16
    width: int = 1024
    out_width: int = 4096
    heads: int = 16
    source: tuple[int, int] = (24, 24)
    keys: Literal["position", "position+content"] = "position"
    train_positions: bool = False
    law: Literal["even", "uniform", "pow2", "uniform_pow2", "all"] = "even"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of the {self.heads} heads")


def sincos_2d(width: int, grid: int) -> Tensor:
    """[grid², width] sines and cosines of the column (first half) and of the row (second half), row-major cells."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    place = torch.arange(grid, dtype=torch.float64)
    row, column = torch.meshgrid(place, place, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1).float()


def resize_positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A square table [g², D] for another grid, [rows · columns, D], by bicubic interpolation in float32."""
    side = round(len(table) ** 0.5)
    if (side, side) == tuple(size):
        return table
    image = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(size), mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.to(table.dtype)


class QueryTransformer(nn.Module):
    """Features [B, S, W] -> tokens [B, m, out_width] by one cross-attention; queries do not see each other.

    Hence the tokens for m are exactly the first m of those for M.
    """

    def __init__(self, config: QueryTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.max_tokens = config.grid**2
        # the official table is made in half precision
        table = sincos_2d(width, config.grid).half().float()
        self.pos_embed = nn.Parameter(table, requires_grad=config.train_positions)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.max_tokens, width), std=0.02))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, config.eps) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.proj = nn.Parameter(torch.randn(width, config.out_width) * width**-0.5)
        for linear in (self.qkv, self.out_proj):
            # the official 0.02 at its width 1024; narrow models would start with tokens that hardly differ
            nn.init.trunc_normal_(linear.weight, std=0.64 * width**-0.5)
            nn.init.zeros_(linear.bias)

    def draw(self, generator: torch.Generator | None = None) -> int:
        """A number of tokens for one training step, by the config's law."""
        law, most = self.config.law, self.max_tokens
        if law == "all":
            return most
        if law == "even":
            return 2 * int(sample_keep(1, max(most // 2, 1), generator=generator)) if most > 1 else 1
        return int(sample_keep(1, most, law, generator=generator))

    def queries(self, m: int) -> Tensor:
        """[m, W] normed queries, before their projection."""
        return self.norm_q(self.query[:m] + self.pos_embed[:m])

    def keys(self, features: Tensor) -> Tensor:
        """[1 or B, S, W] normed keys, before their projection."""
        place = resize_positions(self.pos_embed, self.config.source).to(features.dtype)
        return self.norm_k(place[None] if self.config.keys == "position" else features + place)

    def attention(self, m: int, keys: Tensor) -> Tensor:
        """[1 or B, H, m, S] attention weights of the first m queries on *keys*."""
        weight, bias = (t.chunk(3) for t in (self.qkv.weight, self.qkv.bias))
        q = F.linear(self.queries(m)[None], weight[0], bias[0])
        k = F.linear(keys, weight[1], bias[1])
        q, k = (t.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for t in (q, k))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)

    def attend(self, features: Tensor, m: int) -> Tensor:
        """[B, S, W] -> [B, m, W], the attention's output before the last projection."""
        width = self.config.width
        v = F.linear(self.norm_v(features), self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
        v = v.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)  # [B, H, S, W / H]
        mixed = self.attention(m, self.keys(features)) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, features: Tensor, m: int | None = None) -> Tensor:
        """Tokens for *m*; by default as many as training draws, and all of them otherwise.

        Raises:
            ZooError: m is not in 1..M, or the features are not those of the config's grid.
        """
        rows, columns = self.config.source
        if features.ndim != 3 or list(features.shape[1:]) != [rows * columns, self.config.width]:
            raise ZooError(
                f"the query transformer takes features [B, {rows * columns}, {self.config.width}], "
                f"got {list(features.shape)}"
            )
        if m is None:
            m = self.draw() if self.training else self.max_tokens
        if not 1 <= m <= self.max_tokens:
            raise ZooError(f"this query transformer makes 1 to {self.max_tokens} visual tokens, asked for {m}")
        return self.attend(features, m) @ self.proj
