"""Any causal mixer made bidirectional: one pass in each direction."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.layout import Layout
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer


@config
class BidirectionalConfig:
    """A mixer run forwards and backwards.

    Attributes:
        mixer: catalogue name of a causal mixer.
        options: its options.
        mode: `sum` of both directions, or a linear map of both side by side (`concat`).
        shared: both directions use the same weights (as Caduceus does with its projections).
    """

    mixer: str = "s4d"
    options: dict[str, Any] = field(default_factory=dict)
    mode: Literal["sum", "concat"] = "sum"
    shared: bool = False


class Bidirectional(RowMixer):
    """y = f(x) + flip(g(flip(x))), or W [f(x), flip(g(flip(x)))]. x [B, L, D] -> [B, L, D].

    Each sequence is flipped within its own length, so padding and packing change nothing.

    Raises:
        ConfigError: the mixer is unknown or cannot be causal.
    """

    Config = BidirectionalConfig

    def __init__(self, d_model: int, config: BidirectionalConfig, layer_index: int = 0) -> None:
        super().__init__()
        from zoo.nn.backbone import make_mixer  # the backbone's module builds mixers, this one among them

        self.config = config
        self.ahead = make_mixer(config.mixer, d_model, config.options, layer_index)
        self.ahead.check_layout("causal")
        self.back = None if config.shared else make_mixer(config.mixer, d_model, config.options, layer_index)
        self.out_proj = nn.Linear(2 * d_model, d_model) if config.mode == "concat" else None
        inner = self.ahead.info
        self.info = MixerInfo(
            layouts=frozenset({"full"}), step="none", needs_max_len=inner.needs_max_len, packing=True, split=inner.split
        )

    def mix(self, x: Tensor, count: Tensor | None, state: Any) -> tuple[Tensor, None]:
        layout, turn = Layout("causal"), None
        if count is not None:
            place = torch.arange(x.shape[1], device=x.device)
            valid = place < count[:, None]
            layout = Layout("causal", valid=valid)
            turn = torch.where(valid, count[:, None] - 1 - place, place)[..., None]
        flip = lambda t: t.flip(1) if turn is None else t.gather(1, turn.expand_as(t))
        ahead, _ = self.ahead(x, layout)
        back, _ = (self.ahead if self.back is None else self.back)(flip(x), layout)
        back = flip(back)
        if self.out_proj is None:
            return ahead + back, None
        return self.out_proj(torch.cat([ahead, back], dim=-1)), None

    def cost(self, length: int, batch: int = 1) -> Cost:
        flops = 2 * self.ahead.cost(length, batch).flops
        if self.out_proj is not None:
            flops += 2 * batch * length * self.out_proj.weight.numel()
        return Cost(flops=flops, state_bytes=0)
