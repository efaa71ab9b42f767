"""Any picture model of the library timm as the eyes of a language model: features of one of its stages."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError, nearest


@config
class TimmTowerConfig:
    """Which model, and what is read of it. Weights are never fetched: see `task.tower` of the task `vqa`.

    Attributes:
        name: timm's name of the architecture, as in `timm.list_models()`.
        size: side of the pictures in pixels.
        patch: pixels a side of one feature.
        width: of the features.
        stage: block (of a transformer) or stage (of a convolutional network) that is read, from the end: -1 the last.
        options: further arguments of the architecture.
        mean: subtracted from pixels in [0, 1], a channel; std: they are divided by it.
    """

    name: str
    size: int
    patch: int
    width: int
    stage: int = -1
    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if ":" in self.name:
            raise ValueError(f"'{self.name}' would be fetched: name an architecture of timm")
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"pictures of {self.size} pixels do not divide into patches of {self.patch}")


class TimmTower(nn.Module):
    """Pixels [B, 3, S, S] in [0, 1] -> features [B, g², W] in reading order, of random weights until some are loaded.

    Raises:
        ZooError: timm does not know the model, or its features have another width or stride than the config says.
    """

    Config = TimmTowerConfig

    def __init__(self, config: TimmTowerConfig) -> None:
        import timm

        super().__init__()
        self.config = config
        self.grid = config.size // config.patch
        if not timm.is_model(config.name):
            raise ZooError(f"timm has no model '{config.name}'" + nearest(config.name, timm.list_models()))
        made = {"pretrained": False, "num_classes": 0, **config.options}
        try:
            self.model = timm.create_model(config.name, img_size=config.size, **made)
        except TypeError:  # convolutional networks take pictures of any size, and no argument for it
            self.model = timm.create_model(config.name, **made)
        about = getattr(self.model, "feature_info", None)
        if not about or not -len(about) <= config.stage < 0:
            raise ZooError(f"model.timm.stage must lie in -{len(about or ())}..-1 for {config.name}")
        found = (about[config.stage]["num_chs"], about[config.stage]["reduction"])
        if found != (config.width, config.patch):
            raise ZooError(
                f"stage {config.stage} of {config.name} has width {found[0]} and patches of {found[1]} pixels, "
                f"the config says {config.width} and {config.patch}"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        c = self.config
        if pixels.ndim != 4 or list(pixels.shape[1:]) != [3, c.size, c.size]:
            raise ZooError(f"the vision tower takes pixels [B, 3, {c.size}, {c.size}], got {list(pixels.shape)}")
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (c.mean, c.std))
        pixels = ((pixels - mean) / std).to(next(self.model.parameters()).dtype)
        last = c.stage == -1
        maps = self.model.forward_intermediates(
            pixels, indices=[len(self.model.feature_info) + c.stage], norm=last, stop_early=not last,
            output_fmt="NCHW", intermediates_only=True,
        )[0]  # fmt: skip
        return maps.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def load_official(self, state: dict[str, Tensor], where: str) -> None:
        """Fill the tower from timm's own state dict; its classifier is left out.

        Raises:
            ZooError: a tensor is missing, unknown or of another shape.
        """
        ours = self.model.state_dict()
        outputs = tuple(f"{name}." for name in ("head", "fc", "classifier", "head_dist", "fc_norm", "norm"))
        for key in [*ours, *(key for key in state if not key.startswith(outputs))]:
            here, there = (list(s[key].shape) if key in s else "absent" for s in (ours, state))
            if here != there:
                raise ZooError(
                    f"{where} is not of {self.config.name}: '{key}' is {there} there and {here} in the model"
                )
        self.model.load_state_dict({key: state[key] for key in ours})
