"""3-D convolutions over clips [B, C, T, H, W], causal in time: a frame sees itself and earlier ones.

Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737), section 3.2: the padding in time lies in front, so that the first frame
is coded by itself and a picture is a clip of one frame.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    """A convolution padded by kernel - 1 frames in front and by half the kernel around each frame.

    Args:
        inner, outer: channels.
        kernel: side of the cube.
        stride: of each axis.
        padding: `replicate` repeats the border; `zeros` makes it black (Open-MAGVIT2's weights need it).
        bias: of the convolution.
    """

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: Literal["replicate", "zeros"] = "replicate",
        bias: bool = True,
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.pad = (side, side, side, side, kernel - 1, 0)
        self.mode = "constant" if padding == "zeros" else padding
        self.conv = nn.Conv3d(inner, outer, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.pad, self.mode) if any(self.pad) else x
        conv = self.conv
        plain = x.device.type == "cpu" and x.dtype == conv.weight.dtype == torch.float32
        if plain and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
            # for one small clip torch itself picks a kernel that takes twice as long
            return torch.mkldnn_convolution(x, conv.weight, conv.bias, (0, 0, 0), conv.stride, (1, 1, 1), 1)
        return conv(x)


class FrameGroupNorm(nn.GroupNorm):
    """Group norm whose statistics are those of one frame, which keeps a clip causal."""

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[0], x.shape[2]
        y = super().forward(x.transpose(1, 2).flatten(0, 1))  # [B T, C, H, W]
        return y.unflatten(0, (batch, frames)).transpose(1, 2)


class Swish(nn.Module):
    """x · sigmoid(beta x) with a learned beta for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class DepthToSpace(nn.Module):
    """[B, t·h·w·C, T, H, W] -> [B, C, T·t, H·h, W·w]; the first t - 1 frames, which precede the clip, are dropped."""

    def __init__(self, factor: tuple[int, int, int], causal: bool = True) -> None:
        super().__init__()
        self.factor, self.causal = factor, causal

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.factor
        x = x.unflatten(1, (t, h, w, -1))  # [B, t, h, w, C, T, H, W]
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, t - 1 :] if self.causal else x


class ResidualUnit3d(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1x1 convolution carries x where the width changes."""

    def __init__(self, inner: int, outer: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.act1 = FrameGroupNorm(groups, inner), Swish(inner)
        self.conv1 = CausalConv3d(inner, outer)
        self.norm2, self.act2 = FrameGroupNorm(groups, outer), Swish(outer)
        self.conv2 = CausalConv3d(outer, outer)
        self.shortcut = CausalConv3d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)))
        h = self.conv2(self.act2(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))
