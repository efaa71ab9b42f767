"""A token model over any mixers of the catalogue: embedding, a list of layers, head.

The official language models of H3, BASED and Mamba-2 and PoNet's encoder are all this, with different lists; their
block order (dropout, add, norm, mixer) is the same function under other key names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.models.base import SequenceModel
from zoo.models.encoder import MLMTransform
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.heads import Head, HeadConfig, pool
from zoo.nn.layout import Layout
from zoo.nn.mixer import Mixer
from zoo.nn.mlp import MLPConfig
from zoo.nn.norm import make_norm
from zoo.nn.ponet import separator_blocks
from zoo.nn.state import State


@dataclass
class CountedState(State):
    """The layers' states, and the number of tokens consumed [B]: learned positions go on from there."""

    stack: State
    consumed: Tensor


@config
class LMConfig:
    """Sizes and layers of a token model.

    Attributes:
        d_model: width.
        vocab_size: rows of the vocabulary that mean something.
        vocab_multiple: the embedding is padded to a multiple of this.
        n_layer, mixer, options, mlp: that many equal layers; used when `layers` is empty.
        layers: one spec a layer, for hybrids.
        layout: layout of a plain call; `full` for encoders.
        norm, eps, prenorm: as in BackboneConfig.
        positions: `learned` adds an embedding of each position (max_len of them), `none` leaves order to the mixers.
        max_len: longest input in tokens; None when unbounded.
        token_types: rows of a token-type embedding (BERT); every token is of type 0.
        embed_norm: a norm after the embeddings (BERT).
        separators: token ids that delimit segments; layers that pool segments get them as blocks (PoNet).
        pooler: a tanh layer on the first token, which a `sequence` head then reads (BERT).
        transform: an `lm` head has BERT's transform (linear, GELU, norm) before it and a bias.
        sentence_classes: classes of a second head on the pooler, as pretrained PoNet has; see `sentence_logits`.
        embed_dropout, resid_dropout: on the embedding, and on every sub-layer's output.
        residual_in_fp32: residual stream in float32 under mixed precision.
        init_std: standard deviation of the initial weights of linear layers and embeddings.
        head: what the model predicts.
    """

    d_model: int = 128
    vocab_size: int = 16
    vocab_multiple: int = 1
    n_layer: int = 2
    mixer: str = "mamba2"
    options: dict[str, Any] = field(default_factory=dict)
    mlp: MLPConfig | None = None
    layers: tuple[LayerSpec, ...] = ()
    layout: Literal["causal", "full", "prefix"] = "causal"
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    eps: float = 1e-5
    prenorm: bool = True
    positions: Literal["none", "learned"] = "none"
    max_len: int | None = None
    token_types: int = 0
    embed_norm: bool = False
    separators: tuple[int, ...] = ()
    pooler: bool = False
    transform: bool = False
    sentence_classes: int = 0
    embed_dropout: float = 0.0
    resid_dropout: float = 0.0
    residual_in_fp32: bool = False
    init_std: float = 0.02
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        if self.positions == "learned" and self.max_len is None:
            raise ValueError("learned positions need max_len, the number of them")
        if self.sentence_classes and not self.pooler:
            raise ValueError("sentence_classes need the pooler")


class LM(SequenceModel):
    """Embedding, backbone and head. ids [B, L] -> logits by `config.head.kind`.

    Raises:
        ConfigError: unknown mixers or options, a mixer that cannot serve the layout, or a filter longer than max_len.
    """

    Config = LMConfig

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.layout_kind = config.layout  # type: ignore[misc]
        rows = -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple
        width = config.d_model
        self.embed = nn.Embedding(rows, width)
        self.positions = nn.Embedding(config.max_len or 0, width) if config.positions == "learned" else None
        self.token_types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.embed_norm = make_norm(config.norm, width, config.eps) if config.embed_norm else None
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        spec = LayerSpec(mixer=config.mixer, options=config.options, mlp=config.mlp)
        self.backbone = Backbone(
            BackboneConfig(
                d_model=width, layers=config.layers or (spec,) * config.n_layer, layout=config.layout,
                norm=config.norm, eps=config.eps, prenorm=config.prenorm, dropout=config.resid_dropout,
                residual_in_fp32=config.residual_in_fp32,
            )
        )  # fmt: skip
        self.pooler = nn.Linear(width, width) if config.pooler else None
        self.sentence = nn.Linear(width, config.sentence_classes) if config.sentence_classes else None
        self.transform = MLMTransform(width, rows, config.eps) if config.transform else None
        self.head = Head(config.head, width, rows)
        self.max_len = config.max_len
        mixers = [part for part in self.backbone.modules() if isinstance(part, Mixer)]
        bounded = [mixer for mixer in mixers if mixer.info.needs_max_len]
        if bounded and config.max_len is None:
            raise ConfigError(
                f"mixer {type(bounded[0]).__name__} has filters of a fixed length: set the model's max_len"
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation of linear layers and embeddings; state spaces and convolutions keep their own."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.backbone.scale_residual_init(self.config.init_std)
        self.head.reset_parameters(self.config.init_std)

    def embed_tokens(self, ids: Tensor, layout: Layout) -> Tensor:
        x = self.embed(ids)  # [B, L, D]
        if self.token_types is not None:
            x = x + self.token_types.weight[0]
        if self.positions is not None:
            x = x + self.positions(layout.positions(ids.shape[0], ids.shape[1], ids.device))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.embed_dropout(x)

    def init_state(
        self,
        batch: int,
        max_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> State:
        stack = super().init_state(batch, max_len, device, dtype)
        if self.positions is None:
            return stack
        return CountedState(stack, torch.zeros(batch, dtype=torch.long, device=device))

    def forward_features(self, ids: Tensor, layout: Layout | None = None, state: Any = None) -> tuple[Tensor, Any]:
        layout = Layout(self.layout_kind) if layout is None else layout  # type: ignore[arg-type]
        if self.config.separators and layout.block is None:
            layout = layout.with_(block=separator_blocks(ids, self.config.separators))
        if not isinstance(state, CountedState):
            return super().forward_features(ids, layout, state)
        if layout.position is None:
            layout = layout.with_(position=layout.positions(ids.shape[0], ids.shape[1], ids.device, state.consumed))
        hidden, stack = super().forward_features(ids, layout, state.stack)
        assert stack is not None
        new = ids.shape[1] if layout.valid is None else layout.valid.sum(1)
        return hidden, CountedState(stack, state.consumed + new)

    def pooled(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] -> [B, D]: the pooler on the first valid token."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(pool(hidden, valid, "first")))

    def forward_head(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        if self.pooler is not None and self.head_kind == "sequence":
            return super().forward_head(self.pooled(hidden, valid)[:, None])
        if self.transform is not None and self.head_kind == "lm":
            return super().forward_head(self.transform(hidden), valid) + self.transform.bias
        return super().forward_head(hidden, valid)

    def sentence_logits(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] -> [B, sentence_classes]: the second head, on the pooler."""
        assert self.sentence is not None
        return self.sentence(self.pooled(hidden, valid))
