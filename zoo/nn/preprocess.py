"""What a published visual tokenizer does to a picture before its first layer, as data."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import config


@config
class PreprocessConfig:
    """How a picture becomes the model's input.

    Attributes:
        size: side of the square input in pixels.
        resize: `shorter` (shorter side to `size`, then crop), `both` (squeeze to a square) or `none`.
        kernel: interpolation.
        antialias: filter before shrinking, as PIL does.
        mean: subtracted from pixels in [0, 1], per channel.
        std: divided by afterwards.
    """

    size: int = 256
    resize: Literal["shorter", "both", "none"] = "shorter"
    kernel: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fit_pixels(pixels: Tensor, config: PreprocessConfig) -> Tensor:
    """Resize and centre-crop [..., 3, H, W] in [0, 1] to [..., 3, size, size], clamped to [0, 1]."""
    size, shape = config.size, pixels.shape
    x = pixels.reshape(-1, *shape[-3:])
    if config.resize != "none":
        height, width = shape[-2:]
        short = min(height, width)
        # the longer side is truncated, as torchvision does
        target = (size, size) if config.resize == "both" else (int(size * height / short), int(size * width / short))
        if target != (height, width):
            smooth = {} if config.kernel == "nearest" else {"antialias": config.antialias, "align_corners": False}
            x = F.interpolate(x, size=target, mode=config.kernel, **smooth).clamp(0, 1)
    top, left = (round((n - size) / 2) for n in x.shape[-2:])
    x = x[..., top : top + size, left : left + size]
    return x.reshape(*shape[:-3], *x.shape[-3:])


def normalize(pixels: Tensor, config: PreprocessConfig) -> Tensor:
    """(pixels - mean) / std over channels of [..., 3, H, W]."""
    if config.mean == (0.0, 0.0, 0.0) and config.std == (1.0, 1.0, 1.0):
        return pixels
    mean, std = (
        torch.tensor(v, device=pixels.device, dtype=pixels.dtype)[:, None, None] for v in (config.mean, config.std)
    )
    return (pixels - mean) / std


def denormalize(x: Tensor, config: PreprocessConfig) -> Tensor:
    """The inverse of `normalize`."""
    mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype)[:, None, None] for v in (config.mean, config.std))
    return x * std + mean
