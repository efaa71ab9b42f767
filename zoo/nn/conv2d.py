"""Convolutional image encoders and decoders: the stacks behind MaskGIT-VQGAN and the AutoencoderKL of diffusion models.

Both descend from Esser et al. 2021 (VQGAN, arXiv 2012.09841, appendix A): residual blocks with group norms, halving
the picture between levels on the way in and doubling it on the way out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config


@config
class ConvStackConfig:
    """One encoder or decoder.

    Attributes:
        channels: of the picture.
        widths: channels of each level, finest first; the picture shrinks by 2 between neighbours.
        blocks: residual blocks of a level of the encoder.
        decoder_blocks: the same of the decoder.
        mid_blocks: residual blocks between the narrow end and the coarsest level.
        z_channels: channels at the narrow end (of the encoder's output; the decoder's input).
        groups: of the group norms, eps their epsilon (1e-6 in every published model).
        bias: biases in the residual blocks and in the encoder's first convolution.
        down: `avg_pool` or `conv` (3x3, stride 2, padded right and bottom) between levels.
        mid_attention: one attention layer after the first block of the middle.
        out_kernel: of the encoder's last convolution.
        shortcut: where channels change, `input` adds a 1x1 convolution of the block's input; `output` adds one of
            the block's own output and drops the input, which the MaskGIT-VQGAN weights need.
        dropout: inside the residual blocks.
    """

    channels: int = 3
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    decoder_blocks: int = 2
    mid_blocks: int = 2
    z_channels: int = 256
    groups: int = 32
    bias: bool = True
    down: Literal["avg_pool", "conv"] = "conv"
    mid_attention: bool = False
    out_kernel: int = 3
    shortcut: Literal["input", "output"] = "input"
    dropout: float = 0.0


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero-pad [B, C, H, W] so that a convolution gives ceil(size / stride); an odd pixel goes right and bottom."""
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    return F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))


class BlurPool(nn.Module):
    """Low-pass filter and halve: binomial kernel, stride 2, "same" padding (Zhang 2019, arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        line = torch.tensor([float(math.comb(size - 1, i)) for i in range(size)])
        self.register_buffer("kernel", (line[:, None] * line / line.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(pad_same(x, self.kernel.shape[-1], 2), kernel, stride=2, groups=channels)


def fast_layout(x: Tensor) -> Tensor:
    """[B, C, H, W] with the channels last in memory on a CPU, where convolutions otherwise reorder at every layer."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def group_norm(channels: int, config: ConvStackConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=1e-6)


class ResBlock2d(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, inner: int, outer: int, config: ConvStackConfig) -> None:
        super().__init__()
        self.from_output = config.shortcut == "output"
        self.norm1 = group_norm(inner, config)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=config.bias)
        self.norm2 = group_norm(outer, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=config.bias)
        side = outer if self.from_output else inner
        self.shortcut = nn.Conv2d(side, outer, 1, bias=config.bias) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.shortcut is None:
            return x + h
        return h + self.shortcut(h if self.from_output else x)


class Attention2d(nn.Module):
    """Single-head attention over all positions with a residual, [B, C, H, W] -> the same."""

    def __init__(self, channels: int, config: ConvStackConfig) -> None:
        super().__init__()
        self.norm = group_norm(channels, config)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        y = self.out_proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


def _middle(width: int, config: ConvStackConfig) -> nn.Sequential:
    layers: list[nn.Module] = [ResBlock2d(width, width, config) for _ in range(config.mid_blocks)]
    if config.mid_attention:
        layers.insert(1, Attention2d(width, config))
    return nn.Sequential(*layers)


class Down(nn.Module):
    """Residual blocks, then half the size (not on the coarsest level)."""

    def __init__(self, inner: int, outer: int, config: ConvStackConfig, shrink: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(ResBlock2d(inner if i == 0 else outer, outer, config) for i in range(config.blocks))
        )
        self.shrink = shrink
        self.down = nn.Conv2d(outer, outer, 3, stride=2) if shrink and config.down == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.down is not None:
            return self.down(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2) if self.shrink else x


class Up(nn.Module):
    """Residual blocks, then twice the size by nearest neighbours and a convolution (not on the finest level)."""

    def __init__(self, inner: int, outer: int, config: ConvStackConfig, grow: bool) -> None:
        super().__init__()
        n = config.decoder_blocks
        self.blocks = nn.Sequential(*(ResBlock2d(inner if i == 0 else outer, outer, config) for i in range(n)))
        self.up = nn.Conv2d(outer, outer, 3, padding=1) if grow else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.up is None else self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvEncoder(nn.Module):
    """[B, channels, H, W] -> [B, out_channels, H / f, W / f], f = 2^(levels - 1)."""

    def __init__(self, config: ConvStackConfig, out_channels: int | None = None) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1, bias=config.bias)
        ends = list(zip((widths[0], *widths[:-1]), widths, strict=True))
        self.levels = nn.Sequential(*(Down(a, b, config, i < len(widths) - 1) for i, (a, b) in enumerate(ends)))
        self.mid = _middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1], config)
        k = config.out_kernel
        self.conv_out = nn.Conv2d(widths[-1], out_channels or config.z_channels, k, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.levels(self.conv_in(fast_layout(x))))
        return self.conv_out(F.silu(self.norm_out(x))).contiguous()


class ConvDecoder(nn.Module):
    """[B, z_channels, h, w] -> [B, channels, h · f, w · f]; `levels` are in the order they run, coarsest first."""

    def __init__(self, config: ConvStackConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config)
        ends = list(zip((widths[0], *widths[:-1]), widths, strict=True))
        self.levels = nn.Sequential(*(Up(a, b, config, i < len(widths) - 1) for i, (a, b) in enumerate(ends)))
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.levels(self.mid(self.conv_in(fast_layout(z))))
        return self.conv_out(F.silu(self.norm_out(x))).contiguous()

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution (adaptive GAN weights compare gradients there)."""
        return self.conv_out.weight
