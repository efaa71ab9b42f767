"""Low-rank adapters beside frozen linear layers (Hu et al. 2021, "LoRA", arXiv:2106.09685), as `peft` computes them.

y = W x + b + scale B A dropout(x), where scale = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, rank-
stabilised LoRA, arXiv:2312.03732). B starts at zero, so that training starts from the model as it is. A fused
projection of queries, keys and values is one linear layer and gets one pair of factors.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError, ZooError, nearest
from zoo.nn.pieces import recomputing

ALL_LINEAR = "all-linear"
BACKBONES = ("backbone.", "lm.backbone.")  # the second one stands in a vision-language model


@config
class LoRAConfig:
    """Rank, strength and places of the adapters.

    Attributes:
        rank: of the update of each weight.
        alpha: strength; the update is scaled by alpha / rank.
        dropout: on the adapter's input, in training.
        rslora: scale by alpha / sqrt(rank) instead, which keeps high ranks from learning ever slower.
        targets: linear layers that get an adapter, by the ends of their names (`qkv`, `mixer.out_proj`), as in peft;
            `all-linear` for every one of the blocks. Empty takes those that suit the model's family.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter, [..., in] -> [..., out].

    `weight` is the weight of both together, for code that multiplies with it itself; dropout does not act there.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = config.scale
        self.base_layer = base.requires_grad_(False)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, **like)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.merged = False

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """[out, in] W + scale B A."""
        return self.base_layer.weight if self.merged else self.base_layer.weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta(self) -> Tensor:
        """[out, in] scale B A."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        if self.training and self.config.dropout > 0 and recomputing():
            raise ZooError(
                "sequences this long are computed in pieces, where an adapter's dropout cannot be repeated: "
                "set finetune.lora.dropout=0"
            )
        return y + self.lora_B(self.lora_A(self.dropout(x))) * self.scale

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight; the layer costs what it did without an adapter."""
        if not self.merged:
            self.base_layer.weight += self.delta()
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out again; the weight is restored but for its rounding."""
        if self.merged:
            self.base_layer.weight -= self.delta()
            self.merged = False


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers whose names end in one of *targets* (whole parts: `proj` is no end of `q_proj`).

    Raises:
        ConfigError: a target that no linear layer is called by, naming the nearest.
    """
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | LoRALinear)]
    linear = [name for name in linear if not re.search(r"\.(base_layer|lora_[AB])$", name)]
    if targets == (ALL_LINEAR,):
        return [name for name in linear if name.startswith(BACKBONES)]
    found: list[str] = []
    for target in targets:
        hits = [name for name in linear if name == target or name.endswith("." + target)]
        if not hits:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"finetune.lora.targets: no linear layer of {type(model).__name__} is called '{target}'"
                + nearest(target, ends)
            )
        found += [name for name in hits if name not in found]
    return found


def add_lora(model: nn.Module, config: LoRAConfig, targets: tuple[str, ...] = ()) -> list[str]:
    """Put adapters beside the linear layers that *targets* (or else the config's) name; their names.

    Everything else keeps its `requires_grad`. Adapters inside a layer that several names share are made once.

    Raises:
        ConfigError: see `find_targets`; or there are no targets at all.
    """
    names = find_targets(model, targets or config.targets)
    if not names:
        raise ConfigError("finetune.lora.targets names no linear layer: give the ends of their names")
    for name in names:
        parent, _, child = name.rpartition(".")
        place = model.get_submodule(parent)
        layer = getattr(place, child)
        if isinstance(layer, LoRALinear):
            raise ConfigError(f"{name} has an adapter already")
        setattr(place, child, LoRALinear(layer, config))
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def merge(model: nn.Module) -> nn.Module:
    """Merge every adapter of *model* into its weight, in place."""
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """The reverse of `merge`, but for rounding."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Merge all adapters and put the plain linear layers back, in place: an ordinary model of the same answers."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer.requires_grad_(True))
    return model
