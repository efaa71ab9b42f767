"""The Q-Former: learned queries that read a frozen image encoder through a BERT with cross-attention.

Li et al. 2023 (BLIP-2, arXiv 2301.12597) section 3.1; causal over the queries in SEED (arXiv 2307.08041).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.mlp import MLPConfig, make_mlp
from zoo.nn.vit import CAUSAL, FULL, Attention, Mask, ViTConfig


@config
class QFormerConfig:
    """The defaults are BLIP-2's and SEED's (a BERT-base).

    Attributes:
        width: of the queries; encoder_width: of the image features they read.
        layers: blocks; every `cross_every`-th, from the first on, reads the image.
        heads: of both attentions.
        inner: width inside the feed-forward networks.
        queries: number of learned queries.
        causal: a query sees only the queries before it.
        text_vocab: words of the text side that shares the self-attention, 0 for none; text_length its positions.
        dropout: on sub-layer outputs; attn_dropout: on attention weights.
    """

    width: int = 768
    encoder_width: int = 1408
    layers: int = 12
    cross_every: int = 2
    heads: int = 12
    inner: int = 3072
    queries: int = 32
    causal: bool = True
    text_vocab: int = 0
    text_length: int = 512
    dropout: float = 0.1
    attn_dropout: float = 0.1


class CrossAttention(nn.Module):
    """Queries [B, L, D] read [B, S, E] -> [B, L, D]."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.heads, self.attn_dropout = config.heads, config.attn_dropout
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.encoder_width, 2 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(features).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention (some layers) and a feed-forward network of the side it runs on; norms after."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        vit = ViTConfig(width=config.width, heads=config.heads, attn_dropout=config.attn_dropout)
        mlp = MLPConfig(kind="gelu", width=config.inner)
        norm = lambda: nn.LayerNorm(config.width, 1e-12)
        self.attn, self.norm1 = Attention(vit), norm()
        reads = index % config.cross_every == 0
        self.cross = CrossAttention(config) if reads else None
        self.norm_cross = norm() if reads else None
        self.mlp, self.norm2 = make_mlp(config.width, mlp), norm()
        self.text_mlp = make_mlp(config.width, mlp) if config.text_vocab else None
        self.text_norm = norm() if config.text_vocab else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, features: Tensor, mask: Mask) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        if self.cross is not None and self.norm_cross is not None:
            x = self.norm_cross(x + self.dropout(self.cross(x, features)))
        return self.norm2(x + self.dropout(self.mlp(x)))

    def forward_text(self, x: Tensor, mask: Mask) -> Tensor:
        """The text side: the same self-attention, its own feed-forward network, no cross-attention."""
        assert self.text_mlp is not None
        assert self.text_norm is not None
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.text_norm(x + self.dropout(self.text_mlp(x)))


class QFormer(nn.Module):
    """Image features [B, S, E] -> query states [B, queries, D]; with a text side also captions -> [B, T, D]."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, config.width))
        if config.text_vocab:
            self.word_embed = nn.Embedding(config.text_vocab, config.width)
            self.text_pos = nn.Parameter(0.02 * torch.randn(config.text_length, config.width))
        self.norm_in = nn.LayerNorm(config.width, 1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.layers))

    def forward(self, features: Tensor) -> Tensor:
        x = self.dropout(self.norm_in(self.queries.expand(len(features), -1, -1)))
        mask = CAUSAL if self.config.causal else FULL
        for layer in self.layers:
            x = layer(x, features, mask)
        return x

    def text(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Captions ids [B, T], valid [B, T] bool -> [B, T, D]; every word sees every valid word."""
        x = self.dropout(self.norm_in(self.word_embed(ids) + self.text_pos[: ids.shape[1]]))
        mask = Mask("dense", dense=valid[:, None, None, :])
        for layer in self.layers:
            x = layer.forward_text(x, mask)  # type: ignore[operator]
        return x
