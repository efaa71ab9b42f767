"""Open-MAGVIT2's video tokenizer: 3-D convolutions with look-up-free quantization.

Luo et al. 2024, Open-MAGVIT2, arXiv:2409.04410, section 3.1, after Yu et al. 2023 (MAGVIT-v2, arXiv:2310.05737). Its
group norms see the whole clip, so that tokens of a frame depend on later ones: it is not causal, whatever its padding.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.models.video import ConvVideoModel
from zoo.nn.conv3d import CausalConv3d, DepthToSpace
from zoo.nn.lfq import LFQ, LFQConfig

_GROUPS, _EPS = 32, 1e-6


@config
class OpenMAGVIT2Config:
    """The defaults are the released tokenizer (370.5 M parameters, 4x8x8 pixels a token, 2^18 codes).

    Attributes:
        width: channels at full resolution.
        mults: channels of each stage in units of `width`. A stage of 1 halves rows and columns, others frames too;
            the last one halves nothing.
        blocks: residual blocks a stage.
        quantizer: look-up-free; its dimension is the narrow end's.
    """

    width: int = 128
    mults: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 4
    quantizer: LFQConfig = field(default_factory=LFQConfig)

    def __post_init__(self) -> None:
        if self.width % _GROUPS:
            raise ValueError(f"width must be a multiple of {_GROUPS}, got {self.width}")
        if len(self.mults) < 2:
            raise ValueError("mults needs at least two stages")


def _conv(
    inner: int, outer: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1), bias: bool = True
) -> nn.Module:
    return CausalConv3d(inner, outer, kernel, stride, padding="zeros", bias=bias)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), without biases."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, inner, _EPS), nn.GroupNorm(_GROUPS, outer, _EPS)
        self.conv1, self.conv2 = _conv(inner, outer, bias=False), _conv(outer, outer, bias=False)
        self.shortcut = _conv(inner, outer, 1, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AdaptiveNorm(nn.Module):
    """Group norm whose gain and shift follow from the spread and the mean of the quantized clip."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Linear(latent, width), nn.Linear(latent, width)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        flat = codes.flatten(2)
        gain, shift = self.gain((flat.var(-1) + _EPS).sqrt()), self.shift(flat.mean(-1))
        x = F.group_norm(x, _GROUPS, eps=_EPS)
        return gain[..., None, None, None] * x + shift[..., None, None, None]


class Upsample(nn.Module):
    """Convolution and depth to space; with frames doubled the second one is dropped, or the lone first one kept."""

    def __init__(self, width: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = _conv(width, width * factor[0] * factor[1] * factor[2])
        self.space = DepthToSpace(factor, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.space(self.conv(x))
        return y if self.factor[0] == 1 else torch.cat([y[:, :, :1], y[:, :, 2:]], 2)


class Stage(nn.Module):
    """Residual blocks and, but at the end, a change of resolution."""

    def __init__(self, inner: int, outer: int, blocks: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer) for i in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


def _factor(mult: int) -> tuple[int, int, int]:
    return (1 if mult == 1 else 2, 2, 2)


class MagvitEncoder(nn.Module):
    """Clips [B, 3, T, H, W] in [-1, 1] -> [B, D, T', H', W']."""

    def __init__(self, c: OpenMAGVIT2Config) -> None:
        super().__init__()
        widths = [c.width * m for m in c.mults]
        last = len(widths) - 1
        self.start = _conv(3, c.width, bias=False)
        self.stages = nn.ModuleList(
            Stage(
                c.width if i == 0 else widths[i - 1],
                width,
                c.blocks,
                _conv(width, width, stride=_factor(c.mults[i])) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.middle = Stage(widths[-1], widths[-1], c.blocks, None)
        self.norm = nn.GroupNorm(_GROUPS, widths[-1], _EPS)
        self.end = _conv(widths[-1], c.quantizer.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for stage in self.stages:
            x = stage(x)
        return self.end(F.silu(self.norm(self.middle(x))))


class MagvitDecoder(nn.Module):
    """Codes [B, D, T', H', W'] -> clips [B, 3, T, H, W] in [-1, 1]; stages are numbered from the fine end."""

    def __init__(self, c: OpenMAGVIT2Config) -> None:
        super().__init__()
        widths = [c.width * m for m in c.mults]
        before = [*widths[1:], widths[-1]]
        self.start = _conv(c.quantizer.dim, widths[-1])
        self.middle = Stage(widths[-1], widths[-1], c.blocks, None)
        self.adaptive = nn.ModuleList(AdaptiveNorm(c.quantizer.dim, width) for width in before)
        self.stages = nn.ModuleList(
            Stage(inner, width, c.blocks, Upsample(width, _factor(c.mults[i - 1])) if i else None)
            for i, (inner, width) in enumerate(zip(before, widths, strict=True))
        )
        self.norm = nn.GroupNorm(_GROUPS, widths[0], _EPS)
        self.end = _conv(widths[0], 3)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.middle(self.start(codes))
        for adaptive, stage in zip(reversed(self.adaptive), reversed(self.stages), strict=True):
            x = stage(adaptive(x, codes))
        return self.end(F.silu(self.norm(x)))


class OpenMAGVIT2(ConvVideoModel):
    """Clips [B, 3, T, H, W] in [0, 1] <-> ids [B, T', H', W']; every halving of T frames leaves (T + 1) // 2."""

    span = (-1.0, 1.0)

    def __init__(self, config: OpenMAGVIT2Config) -> None:
        super().__init__()
        self.config = config
        halvings = [_factor(mult) for mult in config.mults[:-1]]
        time = sum(1 for f in halvings if f[0] == 2)
        self.factor = (2**time, 2 ** len(halvings), 2 ** len(halvings))
        self.encoder, self.decoder = MagvitEncoder(config), MagvitDecoder(config)
        self.quantizer = LFQ(config.quantizer)
        self.vocab_size = self.quantizer.vocab_size

    @property
    def last_layer(self) -> Tensor:
        """Weights of the last convolution, which an adaptive adversarial weight looks at."""
        return self.decoder.end.conv.weight  # type: ignore[union-attr, return-value]

    def to_latent(self, clip: Tensor) -> Tensor:
        return self.encoder(clip)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.decoder(codes)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, T', H', W'] int64."""
        self.check_clip(pixels)
        bits = self.encoder(self.normalized(pixels)).movedim(1, -1) > 0
        return (bits * self.quantizer.basis).sum(-1)
