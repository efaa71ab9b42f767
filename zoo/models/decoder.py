"""The causal language model of Llama's shape that GENERator, METAGENE-1 and small recipes of either style share.

Pre-norm blocks of attention with rotary positions and grouped queries, and a SiLU-gated feed-forward network; RMS
norms, no biases (Touvron et al. 2023, arXiv:2302.13971, §2.2). Any causal mixer may stand in attention's place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import catalogue
from zoo.config import config, resolve, to_dict
from zoo.models.base import SequenceModel
from zoo.models.packed import PackedModel
from zoo.nn.attention import AttentionConfig
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.heads import Head, HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig
from zoo.nn.positions import RotaryConfig


@config
class LayerAt:
    """Another mixer in some layers of a decoder.

    Attributes:
        layers: indices of the layers, from 0.
        mixer: catalogue name.
        options: that mixer's config fields; for `attention` they change the model's own (window, sinks).
    """

    layers: tuple[int, ...]
    mixer: str = "attention"
    options: dict[str, Any] = field(default_factory=dict)


@config
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
        d_model: width.
        n_layer: blocks.
        n_head: query heads.
        n_kv_head: key and value heads; 0 takes n_head.
        head_dim: width of a head; 0 takes d_model / n_head.
        d_inner: width of the gated feed-forward network.
        vocab_size: rows of the embedding.
        max_len: longest input in tokens, None for no limit.
        rope: rotary positions.
        window: tokens seen to the left in every layer, None for all.
        bias: biases of the attention projections.
        mixer: mixer of all layers; mixer_options are its options when it is not `attention`.
        hybrid: other mixers, or other spans, in some layers.
        eps: of the RMS norms.
        dropout: on every sub-layer's output.
        init_std: standard deviation of the initial weights.
        depth_init: scale the projections into the residual stream down by depth (METAGENE-1, GPT-2).
        padding: `skip` leaves padded positions out of everything, and their outputs are 0. `eager` and `sdpa` compute
            them as transformers' Llama does under those names, which only the parity of outputs at padding needs.
        pool_pad_id: the token that a `sequence` head takes for padding when it looks for the last token; None goes by
            the batch's `valid`. GENERator's fine-tuning script sets it to </s> = 2 although the tokenizer pads with
            <pad> = 3, so that shorter sequences are read at a padded position.
        head: what the model predicts.
    """

    d_model: int = 512
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 0
    head_dim: int = 0
    d_inner: int = 1408
    vocab_size: int = 4128
    max_len: int | None = None
    rope: RotaryConfig | None = field(default_factory=RotaryConfig)
    window: int | None = None
    bias: bool = False
    mixer: str = "attention"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    hybrid: tuple[LayerAt, ...] = ()
    eps: float = 1e-5
    dropout: float = 0.0
    init_std: float = 0.02
    depth_init: bool = False
    padding: Literal["skip", "eager", "sdpa"] = "skip"
    pool_pad_id: int | None = None
    head: HeadConfig = field(default_factory=lambda: HeadConfig(tied=False))

    def __post_init__(self) -> None:
        for at in self.hybrid:
            for layer in at.layers:
                if not 0 <= layer < self.n_layer:
                    raise ValueError(f"hybrid names layer {layer}, but the model has layers 0 to {self.n_layer - 1}")


class Decoder(PackedModel):
    """Embedding, causal blocks, head. ids [B, L] -> logits by `config.head.kind`."""

    Config = DecoderConfig
    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone = Backbone(
            BackboneConfig(
                d_model=config.d_model,
                layers=tuple(layer_specs(config)),
                layout="causal",
                norm="rmsnorm",
                eps=config.eps,
                dropout=config.dropout,
            )
        )
        self.head = Head(config.head, config.d_model, config.vocab_size)
        self.max_len = config.max_len
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std^2) for embeddings and linear layers; other mixers keep their own."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.depth_init:
            self.backbone.scale_residual_init(std)
        self.head.reset_parameters(std)

    def forward_features(self, ids: Tensor, layout: Layout | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """ids [B, L] -> (hidden [B, L, D] after the final norm, 0 at padding unless `padding` differs; state)."""
        if self.config.padding != "skip" and layout is not None and layout.valid is not None:
            place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            return SequenceModel.forward_features(self, ids, layout.with_(position=place), state)
        return super().forward_features(ids, layout, state)

    def forward(self, ids: Tensor, valid: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
        """Logits of ids [B, L]; valid [B, L] is True for real tokens, segment [B, L] numbers packed documents."""
        hidden, _ = self.forward_features(ids, Layout("causal", valid=valid, segment=segment))
        if self.config.pool_pad_id is not None and self.head_kind == "sequence":
            valid = ids != self.config.pool_pad_id
        return self.forward_head(hidden, valid)


def layer_specs(config: DecoderConfig) -> list[LayerSpec]:
    """One spec a layer: the main mixer, except where `hybrid` names another."""
    mlp = MLPConfig(kind="swiglu", width=config.d_inner, bias=False)
    attention = AttentionConfig(
        heads=config.n_head,
        kv_heads=config.n_kv_head,
        head_dim=config.head_dim,
        bias=config.bias,
        out_bias=config.bias,
        rope=config.rope,
        window=config.window,
        pad_queries=config.padding,
    )
    specs = []
    for i in range(config.n_layer):
        name, options = config.mixer, dict(config.mixer_options)
        for at in config.hybrid:
            if i in at.layers:
                name, options = at.mixer, dict(at.options)
        if name == "attention":
            options = {**to_dict(attention), **options}
        elif config.max_len is not None and _takes_max_len(name):
            options = {"max_len": config.max_len, **options}
        specs.append(LayerSpec(mixer=name, options=options, mlp=mlp))
    return specs


def _takes_max_len(name: str) -> bool:
    fields = dataclasses.fields(resolve(catalogue.lookup(catalogue.MIXERS, name, "mixer")).Config)
    return any(f.name == "max_len" for f in fields)
