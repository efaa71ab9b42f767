"""The mixer protocol: what mixes tokens along the sequence. Blocks differ in nothing else.

Laws, tested over every mixer in the catalogue (tests/unit/test_mixer_laws.py): parallel == chunked == stepwise; a
causal mixer never sees ahead; padding changes nothing; every parameter gets a gradient; the state's size is the one
declared by `cost`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.nn.kernels import steady_heap
from zoo.nn.layout import Layout
from zoo.nn.state import State


@dataclass(frozen=True)
class MixerInfo:
    """What a mixer can do, known when it is built.

    Attributes:
        layouts: the layout kinds it serves.
        step: cost of one decoding step in the length consumed so far: `constant`, `linear` (or polylog) or `none`.
        receptive_field: tokens seen to the left, None when unbounded.
        needs_max_len: its filters depend on a maximum length, which must then equal the trained one.
        packing: packed documents (`Layout.segment`) are kept apart.
        split: how it is split over ranks: `pointwise`, `halo`, `channels`, `heads`, `state` or `gather`.
    """

    layouts: frozenset[str]
    step: Literal["constant", "linear", "none"]
    receptive_field: int | None = None
    needs_max_len: bool = False
    packing: bool = False
    split: Literal["pointwise", "halo", "channels", "heads", "state", "gather"] = "gather"


@dataclass(frozen=True)
class Cost:
    """Forward cost of a mixer on a batch.

    Attributes:
        flops: multiply-adds counted as two.
        state_bytes: exact size of the decoding state after L tokens, in float32 (bytes).
    """

    flops: float
    state_bytes: int


class ParamGroup(TypedDict, total=False):
    """Parameters that want their own optimiser settings; absent keys mean the task's defaults."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: float
    lr: float


class Mixer(nn.Module):
    """Base class. Subclasses set `info` in `__init__`, implement `forward`, and `init_state`/`cost` where it decodes.

    A mixer class names its config class as `Config`, and is built as `Mixer(d_model, config, layer_index)`.
    """

    info: MixerInfo
    Config: type

    def __init__(self) -> None:
        super().__init__()
        steady_heap()

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x [B, L, D] along L. Without a state this is the parallel form; a state is continued and returned."""
        raise NotImplementedError

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State | None:
        """An empty state for *batch* sequences of at most *max_len* tokens.

        Raises:
            ConfigError: the mixer has no step form (it sees the whole sequence at once).
        """
        raise ConfigError(f"{type(self).__name__} sees the whole sequence at once and cannot decode token by token")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> (y [B, D], state). The default is `forward` on a sequence of length 1."""
        y, after = self.forward(x[:, None], Layout("causal"), state)
        assert after is not None
        return y[:, 0], after

    def cost(self, length: int, batch: int = 1) -> Cost:
        """Declared cost for sequences of *length* tokens."""
        raise NotImplementedError

    def param_groups(self) -> list[ParamGroup]:
        """Groups of own parameters that need other optimiser settings than the default (weight decay, rate)."""
        return []

    def check_layout(self, kind: str) -> None:
        """Raise ConfigError at build time when this mixer cannot serve layouts of *kind*."""
        if kind not in self.info.layouts:
            served = ", ".join(sorted(self.info.layouts))
            raise ConfigError(f"mixer {type(self).__name__} cannot serve a '{kind}' layout (it serves: {served})")


def split_param_groups(module: nn.Module) -> list[ParamGroup]:
    """All trainable parameters of *module*: the mixers' own groups first, then one group with the defaults."""
    groups: list[ParamGroup] = []
    taken: set[int] = set()
    for part in _mixers(module):
        for group in part.param_groups():
            params = [p for p in group["params"] if p.requires_grad and id(p) not in taken]
            taken.update(id(p) for p in params)
            if params:
                groups.append({**group, "params": params})
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    return [*groups, {"params": rest}] if rest else groups


def _mixers(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if isinstance(part, Mixer))
