"""HyenaDNA: a causal language model over single nucleotides, up to a million of them.

Nguyen et al. 2023, "HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution", arXiv:2306.15794,
§3.1: pre-norm blocks of Hyena and a feed-forward network. Any causal mixer of the catalogue may stand in Hyena's place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

from torch import Tensor, nn

from zoo import catalogue
from zoo.config import config, resolve, to_dict
from zoo.models.base import SequenceModel
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.heads import Head, HeadConfig
from zoo.nn.hyena import HyenaConfig
from zoo.nn.layout import Layout
from zoo.nn.mixer import Mixer
from zoo.nn.mlp import MLPConfig


@config
class MixerAt:
    """Another mixer in some layers of a stack.

    Attributes:
        layers: indices of the layers, from 0.
        mixer: catalogue name.
        options: that mixer's config fields.
    """

    layers: tuple[int, ...]
    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


@config
class HyenaDNAConfig:
    """Sizes of a HyenaDNA model; the defaults are hyenadna-tiny-1k.

    Attributes:
        d_model: width.
        n_layer: blocks.
        d_inner: width of the feed-forward network; 0 takes 4 * d_model.
        vocab_size: rows of the vocabulary that mean something.
        vocab_multiple: the embedding is padded to a multiple of this (12 -> 16 rows in the released weights).
        max_len: longest input in tokens. Hyena's filters depend on it, so weights are tied to this number.
        hyena: options of the Hyena mixers; their max_len is the one above, whatever stands there.
        mixer: mixer of all layers; mixer_options are its options when it is not `hyena`.
        hybrid: other mixers in some layers.
        embed_dropout, resid_dropout: on the embedding, and on every sub-layer's output.
        residual_in_fp32: residual stream in float32 under mixed precision.
        eps: of the layer norms.
        init_std: standard deviation of the initial weights.
        mask_padding: padding contributes nothing. False treats pads as ordinary tokens, as all official code does;
            classifiers fine-tuned there with padding need it.
        head: what the model predicts.
    """

    d_model: int = 128
    n_layer: int = 2
    d_inner: int = 0
    vocab_size: int = 12
    vocab_multiple: int = 8
    max_len: int = 1026
    hyena: HyenaConfig = field(default_factory=HyenaConfig)
    mixer: str = "hyena"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    hybrid: tuple[MixerAt, ...] = ()
    embed_dropout: float = 0.1
    resid_dropout: float = 0.0
    residual_in_fp32: bool = True
    eps: float = 1e-5
    init_std: float = 0.02
    mask_padding: bool = True
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hyena", dataclasses.replace(self.hyena, max_len=self.max_len))
        for at in self.hybrid:
            for layer in at.layers:
                if not 0 <= layer < self.n_layer:
                    raise ValueError(f"hybrid names layer {layer}, but the model has layers 0 to {self.n_layer - 1}")


class HyenaDNA(SequenceModel):
    """Embedding, backbone of Hyena blocks, head. ids [B, L] -> logits by `config.head.kind`."""

    Config = HyenaDNAConfig

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.embed = nn.Embedding(rows, config.d_model)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        two_sided = config.mixer == "hyena" and config.hyena.bidirectional != "no"
        layout: Literal["causal", "full"] = "full" if two_sided else "causal"
        self.layout_kind = layout
        self.backbone = Backbone(
            BackboneConfig(
                d_model=config.d_model,
                layers=tuple(layer_specs(config)),
                layout=layout,
                eps=config.eps,
                dropout=config.resid_dropout,
                residual_in_fp32=config.residual_in_fp32,
            )
        )
        self.head = Head(config.head, config.d_model, rows)
        bounded = any(m.info.needs_max_len for m in self.backbone.modules() if isinstance(m, Mixer))
        self.max_len = config.max_len if bounded else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation, inside the filter networks too; convolutions and skip weights keep their own."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.backbone.scale_residual_init(std)
        self.head.reset_parameters(std)

    def embed_tokens(self, ids: Tensor, layout: Layout) -> Tensor:
        return self.embed_dropout(self.embed(ids))

    def forward_features(self, ids: Tensor, layout: Layout | None = None, state: Any = None) -> tuple[Tensor, Any]:
        if layout is not None and not self.config.mask_padding:
            layout = layout.with_(valid=None)
        return super().forward_features(ids, layout, state)


def layer_specs(config: HyenaDNAConfig) -> list[LayerSpec]:
    """One spec a layer: the main mixer, except where `hybrid` names another."""
    mlp = MLPConfig(kind="gelu_tanh", width=config.d_inner or 4 * config.d_model)
    specs = []
    for i in range(config.n_layer):
        name, options = config.mixer, config.mixer_options
        if name == "hyena":
            options = {**to_dict(config.hyena), **options}
        for at in config.hybrid:
            if i in at.layers:
                name, options = at.mixer, at.options
        specs.append(LayerSpec(mixer=name, options=_with_max_len(name, options, config.max_len), mlp=mlp))
    return specs


def _with_max_len(name: str, options: dict[str, Any], max_len: int) -> dict[str, Any]:
    """The options with the model's max_len, for mixers that have such a field."""
    fields = dataclasses.fields(resolve(catalogue.lookup(catalogue.MIXERS, name, "mixer")).Config)
    return {**options, "max_len": max_len} if any(f.name == "max_len" for f in fields) else options
