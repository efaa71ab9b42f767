"""BaseConv: the gated short convolution that BASED puts between its attention layers (arXiv:2402.18668)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer, row_mask, row_tail
from zoo.nn.shortconv import causal_short_conv
from zoo.nn.state import State


@config
class BaseConvConfig:
    """Gated short convolution.

    Attributes:
        kernel: taps.
        expand: inner width over d_model, of both halves together.
        bias: biases of the projections.
        conv_bias: bias of the convolution.
    """

    kernel: int = 3
    expand: int = 4
    bias: bool = True
    conv_bias: bool = False


@dataclass
class ConvState(State):
    """[B, K-1, C]: the last inputs of a short convolution."""

    history: Tensor


class BaseConv(RowMixer):
    """Gated short convolution of BASED: W_out(SiLU(conv(u1)) · u2) with [u1, u2] = W_in x. x [B, L, D] -> [B, L, D]."""

    Config = BaseConvConfig

    def __init__(self, d_model: int, config: BaseConvConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.inner = config.expand * d_model // 2
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=config.bias)
        bound = config.kernel**-0.5
        self.conv_weight = nn.Parameter(torch.empty(self.inner, 1, config.kernel).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.zeros(self.inner)) if config.conv_bias else None
        self.out_proj = nn.Linear(self.inner, d_model, bias=config.bias)
        self.info = MixerInfo(
            layouts=frozenset({"causal"}),
            step="constant",
            receptive_field=config.kernel - 1,
            packing=True,
            split="halo",
        )

    def mix(self, x: Tensor, count: Tensor | None, state: ConvState | None) -> tuple[Tensor, ConvState | None]:
        u, gate = self.in_proj(x).split(self.inner, dim=-1)
        u = row_mask(u, count)
        history = None if state is None else state.history.to(u.dtype)
        y = causal_short_conv(u.contiguous(), self.conv_weight, self.conv_bias, history)
        if state is not None:
            state = ConvState(row_tail(u, state.history, count))
        return self.out_proj(F.silu(y) * gate), state

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ConvState:
        """The empty state: constant in max_len."""
        dtype = dtype if dtype == torch.float64 else torch.float32
        return ConvState(torch.zeros(batch, self.config.kernel - 1, self.inner, device=device, dtype=dtype))

    def cost(self, length: int, batch: int = 1) -> Cost:
        weights = sum(p.numel() for p in self.parameters())
        return Cost(
            flops=float(2 * batch * length * weights), state_bytes=4 * batch * (self.config.kernel - 1) * self.inner
        )
