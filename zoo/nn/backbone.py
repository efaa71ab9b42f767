"""The backbone: a stack of residual blocks built from a list of layer specs, so that a hybrid is simply a list."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import catalogue
from zoo.config import config, from_dict, resolve
from zoo.errors import ZooError
from zoo.nn.layout import CAUSAL, Layout
from zoo.nn.mixer import Mixer
from zoo.nn.mlp import MLPConfig, make_mlp
from zoo.nn.norm import make_norm
from zoo.nn.pieces import in_pieces
from zoo.nn.state import Stack


@config
class LayerSpec:
    """One layer: a mixer by its catalogue name and that mixer's options; `mlp: null` leaves the feed-forward out."""

    mixer: str = "hyena"
    options: dict[str, Any] = field(default_factory=dict)
    mlp: MLPConfig | None = field(default_factory=MLPConfig)


@config
class BackboneConfig:
    """A stack of blocks of width d_model.

    Attributes:
        layers: one spec a layer.
        layout: the layout kind the stack is built for; a mixer that cannot serve it is refused at build time.
        norm: `layernorm` or `rmsnorm`; eps is its epsilon.
        prenorm: norm before each sub-layer and once at the end (GPT-2, Llama); False: norm after each residual sum
            and none at the end (BERT).
        dropout: on each sub-layer's output.
        residual_in_fp32: carry the residual stream in float32 under mixed precision (HyenaDNA, safari).
    """

    d_model: int
    layers: tuple[LayerSpec, ...]
    layout: Literal["causal", "full", "prefix", "block_causal", "window"] = "causal"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    eps: float = 1e-5
    prenorm: bool = True
    dropout: float = 0.0
    residual_in_fp32: bool = False


def make_mixer(name: str, d_model: int, options: dict[str, Any], layer_index: int = 0) -> Mixer:
    """Build the mixer called *name* in the catalogue.

    Raises:
        ConfigError: unknown mixer, unknown option or a wrong type.
    """
    mixer_class = resolve(catalogue.lookup(catalogue.MIXERS, name, "mixer"))
    return mixer_class(d_model, from_dict(mixer_class.Config, options, f"mixer '{name}'"), layer_index)


class Block(nn.Module):
    """x -> x + mixer(norm(x)) -> x + mlp(norm(x)) (pre-norm), or the norms after the sums (post-norm)."""

    def __init__(self, config: BackboneConfig, spec: LayerSpec, layer_index: int) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.residual_in_fp32 = config.residual_in_fp32
        self.mixer = make_mixer(spec.mixer, config.d_model, spec.options, layer_index)
        self.mixer.check_layout(config.layout)
        self.norm1 = make_norm(config.norm, config.d_model, config.eps)
        self.mlp: Any = make_mlp(config.d_model, spec.mlp) if spec.mlp is not None else None
        self.norm2: Any = make_norm(config.norm, config.d_model, config.eps) if spec.mlp is not None else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout, state: Any = None) -> tuple[Tensor, Any]:
        if layout.segment is not None and not self.mixer.info.packing:
            raise ZooError(
                f"mixer {type(self.mixer).__name__} cannot keep packed documents apart: "
                "batch documents of like length instead"
            )
        if self.prenorm:
            y, state = self.mixer(self._norm(self.norm1, x), layout, state)
            x = x + self.dropout(y)
            return (x if self.mlp is None else self._feed_forward(x)), state
        y, state = self.mixer(x, layout, state)
        x = self.norm1(x + self.dropout(y))
        if self.mlp is not None:
            x = self.norm2(x + self.dropout(self.mlp(x)))
        return x, state

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x + mlp(norm(x)), long sequences in pieces: the inner width would be the largest tensor of the block."""
        drop = self.training and self.dropout.p > 0
        tower = lambda _context, h: (self.mlp(self._norm(self.norm2, h)),)
        whole = lambda _context, h: (h + self.mlp(self._norm(self.norm2, h)),)
        params = [*self.norm2.parameters(), *self.mlp.parameters()]
        width = max(p.shape[0] for p in params)
        (y,) = in_pieces(tower if drop else whole, [x], params, width)
        return x + self.dropout(y) if drop else y

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        # the residual stream may be float32 while the weights are bf16
        return norm(x.to(norm.weight.dtype)) if self.residual_in_fp32 else norm(x)


class Backbone(nn.Module):
    """Blocks and (pre-norm) a final norm. Embeddings and heads stand outside, so every modality can share it."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, spec, i) for i, spec in enumerate(config.layers))
        self.norm: Any = make_norm(config.norm, config.d_model, config.eps) if config.prenorm else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor, layout: Layout = CAUSAL, state: Stack | None = None) -> tuple[Tensor, Stack | None]:
        """x [B, L, D] -> (hidden [B, L, D], state). A state (from `init_state`) is continued: chunked prefill."""
        if self.config.residual_in_fp32:
            x = x.float()
        states: list[Any] = list(state.layers) if state is not None else [None] * len(self.layers)
        for i, layer in enumerate(self.layers):
            if self.grad_checkpointing and self.training and state is None:
                x = checkpoint(lambda h, layer=layer: layer(h, layout)[0], x, use_reentrant=False)
            else:
                x, states[i] = layer(x, layout, states[i])
        if self.config.residual_in_fp32 and self.config.prenorm:
            x = x.to(self.norm.weight.dtype)
        return self.norm(x), Stack(states) if state is not None else None

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Stack:
        """Empty states for all layers.

        Raises:
            ConfigError: a layer's mixer has no step form.
        """
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        return Stack([mixer.init_state(batch, max_len, device, dtype) for mixer in mixers])

    @torch.no_grad()
    def scale_residual_init(self, std: float = 0.02) -> None:
        """Redraw the projections into the residual stream with std / sqrt(2 n_layer) (GPT-2, §2.3)."""
        scaled = std / math.sqrt(2 * len(self.layers))
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "down.weight")):
                nn.init.normal_(weight, std=scaled)
