"""Optimiser and schedule shared by all tasks: AdamW, a linear warm-up, then constant, cosine or linear decay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from zoo.config import config
from zoo.errors import ConfigError

_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.")
_INPUT = ("embed", "positions", "token_types")


@config
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) and the learning rate over the optimiser steps of a run.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled decay of every group that does not set its own.
        betas, eps: of Adam.
        warmup_steps: steps of linear warm-up; 0 takes warmup_ratio.
        warmup_ratio: warm-up as a share of all steps.
        schedule: after the warm-up.
        min_lr_ratio: the rate at the last step, as a share of lr (cosine and linear).
        backbone_lr_ratio: rate of everything but the head, as a share of lr (fine-tuning a pretrained backbone).
        layer_decay: each layer's rate is this share of the next one's: the head (and the final norm) train at lr, the
            last block at lr * layer_decay, the embeddings slowest (Bao et al. 2022, arXiv:2106.08254, §2.4); 1: none.
    """

    lr: float = 6e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    warmup_ratio: float = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    min_lr_ratio: float = 0.1
    backbone_lr_ratio: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie between 0 and 1, got {self.warmup_ratio}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie between 0 and 1, got {self.min_lr_ratio}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Share of the peak rate at optimiser step *step* (counted from 0) of *total*."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Share of the rate of each parameter of a model by its name: block i of n gets decay^(n - i).

    Raises:
        ConfigError: the model has no numbered blocks.
    """
    names = list(names)
    blocks = {name: int(found[1]) for name in names if (found := _BLOCK.match(name))}
    if not blocks:
        raise ConfigError("task.optim.layer_decay needs a model with a backbone of blocks; this one has none")
    depth = max(blocks.values()) + 1
    lowest = {name: 0 if name.startswith(_INPUT) else depth + 1 for name in names}
    return {name: decay ** (depth + 1 - (blocks[name] + 1 if name in blocks else lowest[name])) for name in names}


def make_optimizer(
    groups: list[Any],
    config: OptimConfig,
    total: int,
    fused: bool = True,
    head: set[int] | None = None,
    scales: dict[int, float] | None = None,
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over *groups* and its schedule over *total* steps.

    A group may carry `weight_decay`, `lr` (absolute) or `lr_scale` (share of `config.lr`). *head* holds the ids of
    the parameters that `backbone_lr_ratio` leaves at the full rate; *scales* further shares of the rate by id.
    """
    scales = scales or {}
    built: list[dict[str, Any]] = []
    for group in groups:
        rate = group.get("lr", config.lr * group.get("lr_scale", 1.0))
        decay = group.get("weight_decay", config.weight_decay)
        parts = [(list(group["params"]), rate)]
        if config.backbone_lr_ratio != 1.0 and head:
            outer = [p for p in group["params"] if id(p) in head]
            inner = [p for p in group["params"] if id(p) not in head]
            parts = [(outer, rate), (inner, rate * config.backbone_lr_ratio)]
        for params, lr in parts:
            for scale in sorted({scales.get(id(p), 1.0) for p in params}):
                kept = [p for p in params if scales.get(id(p), 1.0) == scale]
                built.append({"params": kept, "lr": lr * scale, "weight_decay": decay})
    optimizer = torch.optim.AdamW(built, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(step, total, config))
