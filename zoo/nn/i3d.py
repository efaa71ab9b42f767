"""Inflated 3-D Inception, whose Kinetics-400 logits the Frechet video distance compares.

Carreira and Zisserman 2017 (I3D, arXiv 1705.07750), figure 3; used for FVD by Unterthiner et al. 2018 (arXiv
1812.01717). Layer names are the paper's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# channels of each mixed layer: 1x1; 1x1 -> 3x3; 1x1 -> 3x3; pool -> 1x1
_MIXED = {
    "Mixed_3b": (64, (96, 128), (16, 32), 32),
    "Mixed_3c": (128, (128, 192), (32, 96), 64),
    "Mixed_4b": (192, (96, 208), (16, 48), 64),
    "Mixed_4c": (160, (112, 224), (24, 64), 64),
    "Mixed_4d": (128, (128, 256), (24, 64), 64),
    "Mixed_4e": (112, (144, 288), (32, 64), 64),
    "Mixed_4f": (256, (160, 320), (32, 128), 128),
    "Mixed_5b": (256, (160, 320), (32, 128), 128),
    "Mixed_5c": (384, (192, 384), (48, 128), 128),
}


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zero-pad [B, C, T, H, W] so that a window gives ceil(size / stride); the odd cell goes behind."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads) if any(pads) else x


class Unit3d(nn.Module):
    """Convolution with "same" padding, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inner, outer, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outer, eps=eps, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_pad(x, self.kernel, self.stride))))


class SamePool3d(nn.Module):
    """Maximum with "same" zero padding (inputs are not negative)."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(same_pad(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four branches side by side, [B, C, T, H, W] -> [B, C', T, H, W]."""

    def __init__(self, inner: int, name: str, eps: float) -> None:
        super().__init__()
        one, (two_a, two_b), (three_a, three_b), four = _MIXED[name]
        self.b0 = Unit3d(inner, one, eps=eps)
        self.b1a, self.b1b = Unit3d(inner, two_a, eps=eps), Unit3d(two_a, two_b, 3, eps=eps)
        self.b2a, self.b2b = Unit3d(inner, three_a, eps=eps), Unit3d(three_a, three_b, 3, eps=eps)
        self.b3a, self.b3b = SamePool3d((3, 3, 3), (1, 1, 1)), Unit3d(inner, four, eps=eps)
        self.width = one + two_b + three_b + four

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class _Output(nn.Module):
    """The last 1x1x1 convolution, under the name that weight files give it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class InceptionI3d(nn.Module):
    """Clips [B, 3, T, 224, 224] in [-1, 1], T at least 9, -> logits [B, classes], the mean over time.

    Args:
        classes: of the output.
        channels: of the clip.
        eps: of the batch norms. Published FVDs use 1e-5; the weights were trained with 1e-3.
    """

    def __init__(self, classes: int = 400, channels: int = 3, eps: float = 1e-5) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3d(channels, 64, 7, 2, eps)
        self.MaxPool3d_2a_3x3 = SamePool3d((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3d(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = Unit3d(64, 192, 3, eps=eps)
        self.MaxPool3d_3a_3x3 = SamePool3d((1, 3, 3), (1, 2, 2))
        width = 192
        for name in _MIXED:
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = SamePool3d((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = SamePool3d((2, 2, 2), (2, 2, 2))
            mixed = Mixed(width, name, eps)
            setattr(self, name, mixed)
            width = mixed.width
        self.logits = _Output(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():  # in the order they were added
            if name != "logits":
                x = layer(x)
        x = F.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
        return self.logits(x).flatten(2).mean(2)
