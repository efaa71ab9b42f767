"""Position-wise feed-forward networks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.pieces import last_linear


@config
class MLPConfig:
    """Feed-forward network of a block.

    Attributes:
        kind: `gelu` (erf), `gelu_tanh`, `quick_gelu` (x sigmoid(1.702 x), OpenAI's CLIP), `relu` or `silu` for two
            linear layers; `swiglu` (SiLU gate, Llama) or `geglu` (erf-GELU gate on the first half, MosaicBERT) for
            gated ones.
        width: inner width (of one half, where gated).
        bias: biases in all linear layers; for `geglu` only in the last, as in MosaicBERT.
    """

    kind: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu"] = "gelu_tanh"
    width: int = 512
    bias: bool = True


class MLP(nn.Module):
    """Linear -> activation -> Linear, [..., D] -> [..., D]; fc2's weight is scaled down at initialisation by depth."""

    def __init__(self, d_model: int, config: MLPConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.fc1 = nn.Linear(d_model, config.width, bias=config.bias)
        self.fc2 = nn.Linear(config.width, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.kind == "gelu_tanh":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "gelu":
            x = F.gelu(x)
        elif self.kind == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.relu(x) if self.kind == "relu" else F.silu(x)
        return last_linear(self.fc2, x)


class GatedMLP(nn.Module):
    """act(gate) * up -> down, with gate and up in one matrix product (`gate` first), [..., D] -> [..., D]."""

    def __init__(self, d_model: int, config: MLPConfig) -> None:
        super().__init__()
        self.kind = config.kind
        inner_bias = config.bias and config.kind != "geglu"
        self.gate_up = nn.Linear(d_model, 2 * config.width, bias=inner_bias)
        self.down = nn.Linear(config.width, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return last_linear(self.down, (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * up)


def make_mlp(d_model: int, config: MLPConfig) -> nn.Module:
    """The feed-forward network that *config* names."""
    return (GatedMLP if config.kind in ("swiglu", "geglu") else MLP)(d_model, config)
