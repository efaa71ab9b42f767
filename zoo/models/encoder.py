"""The bidirectional encoder of MosaicBERT's shape that DNABERT-2 and small recipes of its style share.

Post-norm blocks of attention with symmetric ALiBi and a GELU-gated feed-forward network (Portes et al. 2023,
arXiv:2312.17482, §3). Batches of unlike lengths run without padding, and the position bias is a vector a head.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from torch import Tensor, nn

from zoo.config import config, to_dict
from zoo.models.packed import PackedModel
from zoo.nn.attention import AttentionConfig
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.heads import Head, HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig


@config
class EncoderConfig:
    """Sizes of an encoder.

    Attributes:
        d_model: width.
        n_layer: blocks.
        n_head: attention heads.
        d_inner: width of the gated feed-forward network.
        vocab_size: rows of the embedding.
        type_vocab: token types (sentence A and B); type 0 is added to every token, whatever the input.
        max_len: longest input in tokens; None for no limit, since ALiBi's bias exists at any distance.
        mixer: mixer of all layers, `attention` or another that serves a `full` layout; mixer_options are its own.
        prenorm: norm before each sub-layer instead of after the sums.
        eps: of the layer norms.
        dropout: on embeddings and every sub-layer's output.
        attn_dropout: on attention weights.
        init_std: standard deviation of the initial weights.
        pooler: a `sequence` head that reads the first position passes it through tanh(Linear) before (BERT).
        head: what the model predicts; an `lm` head has BERT's transform (linear, GELU, norm) before it and a bias.
    """

    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_inner: int = 3072
    vocab_size: int = 4096
    type_vocab: int = 2
    max_len: int | None = None
    mixer: str = "attention"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    prenorm: bool = False
    eps: float = 1e-12
    dropout: float = 0.1
    attn_dropout: float = 0.0
    init_std: float = 0.02
    pooler: bool = True
    head: HeadConfig = field(default_factory=HeadConfig)


class MLMTransform(nn.Module):
    """Linear, GELU, norm in front of the output embedding, and the output's bias."""

    def __init__(self, d_model: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.bias = nn.Parameter(nn.init.zeros_(self.dense.weight.new_empty(vocab_size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.dense(x)))


class Encoder(PackedModel):
    """Embedding, bidirectional blocks, head. ids [B, L] -> logits by `config.head.kind`."""

    layout_kind = "full"
    Config = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_type = nn.Embedding(config.type_vocab, config.d_model)
        self.embed_norm = nn.LayerNorm(config.d_model, eps=config.eps)
        self.embed_dropout = nn.Dropout(config.dropout)
        options = dict(config.mixer_options)
        if config.mixer == "attention":
            attention = AttentionConfig(
                heads=config.n_head, bias=True, out_bias=True, alibi=True, dropout=config.attn_dropout
            )
            options = {**to_dict(attention), **options}
        layer = LayerSpec(mixer=config.mixer, options=options, mlp=MLPConfig(kind="geglu", width=config.d_inner))
        self.backbone = Backbone(
            BackboneConfig(
                d_model=config.d_model,
                layers=(layer,) * config.n_layer,
                layout="full",
                eps=config.eps,
                prenorm=config.prenorm,
                dropout=config.dropout,
            )
        )
        self.max_len = config.max_len
        self._build_head()
        self.reset_parameters()

    def _build_head(self) -> None:
        cfg, like = self.config, self.embed.weight
        self.head = Head(cfg.head, cfg.d_model, cfg.vocab_size)
        lm = cfg.head.kind == "lm"
        reads_first = cfg.head.kind == "sequence" and cfg.head.pooling == "first"
        self.transform = MLMTransform(cfg.d_model, cfg.vocab_size, cfg.eps) if lm else None
        self.pooler = nn.Linear(cfg.d_model, cfg.d_model) if reads_first and cfg.pooler else None
        for part in (self.head, self.transform, self.pooler):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype)

    def reset_parameters(self) -> None:
        """N(0, init_std^2) for embeddings and linear layers, zero biases; other mixers keep their own."""
        for module in self.modules():
            self._draw(module)
        self.head.reset_parameters(self.config.init_std)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed_tokens(self, ids: Tensor, layout: Layout) -> Tensor:
        return self.embed_dropout(self.embed_norm(self.embed(ids) + self.embed_type.weight[0]))

    def forward_head(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] -> [B, L, V], [B, num_outputs] or [B, L, num_outputs] by the head's kind."""
        if self.transform is not None:
            return super().forward_head(self.transform(hidden), valid) + self.transform.bias
        if self.pooler is not None:
            return self.head(self.pooled(hidden, valid)[:, None])
        return super().forward_head(hidden, valid)

    def pooled(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, D] BERT's pooled output: tanh of a linear map of the first valid position."""
        assert self.pooler is not None
        first = hidden[:, 0]
        if valid is not None:
            first = hidden[range(len(hidden)), valid.int().argmax(1)]
        return self.pooler(first).tanh()

    def reset_head(self, num_outputs: int, kind: str = "sequence", pooling: str = "first", **options: Any) -> None:
        """Replace the head by a fresh one, with the pooler or transform that it needs; the config follows."""
        super().reset_head(num_outputs, kind, pooling, **options)
        self._build_head()
        for part in (self.transform, self.pooler):
            for module in part.modules() if part is not None else ():
                self._draw(module)
        self.head.reset_parameters(self.config.init_std)
