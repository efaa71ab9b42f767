"""GENERator: a decoder over 6-mers, to 98 kilobases, for generation, variant scores and classification.

Wu et al. 2025, "GENERator: A Long-Context Generative Genomic Foundation Model", arXiv:2502.07272.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.models.decoder import Decoder, DecoderConfig, LayerAt
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.positions import RotaryConfig

SPECIALS = 32  # ids below are no k-mers
K = 6


@config
class ChunksConfig:
    """Classification of inputs longer than the context: pieces are read apart, their last states concatenated.

    Attributes:
        size: tokens a piece.
        count: pieces; later ones are not read, missing ones count as zeros.
    """

    size: int = 8192
    count: int = 8


@config
class GENERatorConfig(DecoderConfig):
    """Sizes of a GENERator; the defaults are the 1.2B one. Other fields: see DecoderConfig.

    Attributes:
        chunks: classify by the ensemble of chunks.
    """

    d_model: int = 2048
    n_layer: int = 26
    n_head: int = 32
    n_kv_head: int = 4
    d_inner: int = 5632
    vocab_size: int = 4128
    max_len: int | None = 16384
    rope: RotaryConfig | None = field(default_factory=lambda: RotaryConfig(base=500000.0))
    hybrid: tuple[LayerAt, ...] = ()
    head: HeadConfig = field(default_factory=lambda: HeadConfig(tied=False))
    chunks: ChunksConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks is not None and self.head.kind != "sequence":
            raise ValueError(f"chunks need a head of kind 'sequence', got '{self.head.kind}'")


class GENERator(Decoder):
    """A decoder over k-mers. With `chunks`, a classifier over the concatenated last states of the pieces."""

    Config = GENERatorConfig
    config: GENERatorConfig

    def __init__(self, config: GENERatorConfig) -> None:
        super().__init__(config)
        self.chunk_head: nn.Linear | None = None
        if config.chunks is not None:
            del self.head
            self.head = nn.Identity()  # type: ignore[assignment]
            self.chunk_head = nn.Linear(config.chunks.count * config.d_model, config.head.num_outputs, bias=False)
            nn.init.normal_(self.chunk_head.weight, std=config.init_std)
            self.max_len = None  # each piece is short enough

    @property
    def head_kind(self) -> str:
        return self.config.head.kind

    def reset_head(self, num_outputs: int, kind: str = "sequence", pooling: str = "last", **options: Any) -> None:
        if self.config.chunks is not None:
            raise ConfigError("a chunk ensemble's head is part of its config: build the model with another one")
        super().reset_head(num_outputs, kind, pooling, **options)

    def forward(self, ids: Tensor, valid: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
        if self.config.chunks is None or self.chunk_head is None:
            return super().forward(ids, valid, segment)
        return self.chunk_head(self.chunk_features(ids, valid).flatten(1))

    def chunk_features(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, count, D]: the state at the last valid token of each piece of `size` tokens; zeros where none is left.

        Unless `padding` is `skip` the rule of the published code holds to the letter: only whole pieces are read, and
        a piece of nothing but padding is read at its last position.
        """
        assert self.config.chunks is not None
        size, count = self.config.chunks.size, self.config.chunks.count
        official = self.config.padding != "skip"
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        rows = torch.arange(len(ids), device=ids.device)
        features = []
        for start in range(0, min(ids.shape[1], size * count), size):
            part, real = ids[:, start : start + size], valid[:, start : start + size]
            if part.shape[1] < size and official:
                break
            hidden, _ = self.forward_features(part, Layout("causal", valid=real))
            place = torch.arange(part.shape[1], device=ids.device)
            last = real.sum(1) - 1 if official else torch.where(real, place, -1).amax(1)
            feature = hidden[rows, last]
            features.append(feature if official else feature.masked_fill(~real.any(1)[:, None], 0))
        like = self.embed.weight
        features += [like.new_zeros(len(ids), self.config.d_model)] * (count - len(features))
        return torch.stack(features, dim=1)


def base_table(vocab_size: int = 4128, specials: int = SPECIALS, k: int = K) -> Tensor:
    """[V, k] bases (0 to 3, in the tokenizer's order A, T, C, G) of each token; -1 for special ones."""
    token = torch.arange(vocab_size) - specials
    digits = torch.stack([token.div(4**place, rounding_mode="floor") % 4 for place in reversed(range(k))], dim=1)
    return digits.masked_fill((token < 0)[:, None], -1)


def allele_probabilities(logits: Tensor, table: Tensor | None = None) -> Tensor:
    """[..., 4] probabilities that the next token starts with A, T, C, G, from its logits [..., V].

    The rest belongs to special tokens.
    """
    table = base_table(logits.shape[-1]) if table is None else table
    first = torch.nn.functional.one_hot(table[:, 0].clamp_min(0), 4) * (table[:, :1] >= 0)
    return torch.softmax(logits.float(), -1) @ first.to(logits.device, torch.float32)


def variant_score(logits: Tensor, ref: Tensor, alt: Tensor) -> Tensor:
    """[B] log(p_ref / (p_alt + 1e-10)) of single-base alleles that follow the context whose last logits are [B, V].

    Args:
        ref, alt: [B] long, 0 to 3 as A, T, C, G.
    """
    p = allele_probabilities(logits)
    p_ref, p_alt = p.gather(-1, ref[:, None])[:, 0], p.gather(-1, alt[:, None])[:, 0]
    return torch.log(p_ref / (p_alt + 1e-10))
