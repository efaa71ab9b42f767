"""The video tokenizer of NBP: MAGVIT-v2's causal 3-D convolutions with finite scalar quantization.

Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737), section 3.2; Mentzer et al. 2023 (FSQ, arXiv 2309.15505); in this form
the tokenizer of Ren et al. 2025 (NBP, arXiv 2502.07737), appendix A. It is causal throughout: the tokens of a frame
depend on it and earlier ones alone, and a picture is a clip of one frame.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.models.video import ConvVideoModel
from zoo.nn.codebook import Quantized
from zoo.nn.conv3d import CausalConv3d, DepthToSpace, FrameGroupNorm, ResidualUnit3d, Swish
from zoo.nn.fsq import FSQ, FSQConfig


@config
class NBPTokenizerConfig:
    """The defaults are the released tokenizers (370.4 M parameters, 4x8x8 pixels a token).

    Attributes:
        widths: channels at full, half and (after the last halving) an eighth of the resolution.
        blocks: residual units a stage; the narrow end has twice as many.
        groups: of the group norms.
        patch: side of the squares of pixels that enter as channels. 2 and 4 do so in place of the first one or two
            halvings of rows and columns: a cheaper network for small pictures. The released weights need 1.
        embed: channels at the narrow end; linear maps connect them with the quantizer where it has other dimensions.
        fsq: quantizer. The released weights need its `tan_shift` and `truncate_ids`.
    """

    widths: tuple[int, int, int] = (128, 256, 512)
    blocks: int = 4
    groups: int = 32
    patch: Literal[1, 2, 4] = 1
    embed: int = 6
    fsq: FSQConfig = field(default_factory=lambda: FSQConfig(tan_shift=True, truncate_ids=True))


class ProjectedFSQ(nn.Module):
    """FSQ between linear maps, for inputs [..., D] whose width is not the quantizer's."""

    def __init__(self, width: int, config: FSQConfig) -> None:
        super().__init__()
        self.fsq = FSQ(config)
        self.vocab_size = self.fsq.vocab_size
        same = width == self.fsq.dim
        self.project_in = nn.Identity() if same else nn.Linear(width, self.fsq.dim)
        self.project_out = nn.Identity() if same else nn.Linear(self.fsq.dim, width)

    def forward(self, z: Tensor) -> Quantized:
        result = self.fsq(self.project_in(z))
        return Quantized(self.project_out(result.codes), result.ids, result.loss, result.parts)

    def lookup(self, ids: Tensor) -> Tensor:
        """[...] int -> [..., D]."""
        return self.project_out(self.fsq.lookup(ids))


class NBPTokenizer(ConvVideoModel):
    """Clips [B, 3, 1 + 4n, 8h, 8w] in [0, 1] <-> ids [B, 1 + n, h, w]."""

    factor = (4, 8, 8)

    def __init__(self, config: NBPTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Sequential(*_encoder(config))
        self.decoder = nn.Sequential(*_decoder(config))
        self.quantizer = ProjectedFSQ(config.embed, config.fsq)
        self.vocab_size = self.quantizer.vocab_size

    @property
    def last_layer(self) -> Tensor:
        """Weights of the last convolution, which an adaptive adversarial weight looks at."""
        return self.decoder[-1].conv.weight

    def to_latent(self, clip: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, D, T', H', W'] before quantization."""
        side = self.config.patch
        if side > 1:
            clip = F.pixel_unshuffle(clip.transpose(1, 2), side).transpose(1, 2)  # [B, 3 p², T, H / p, W / p]
        return self.encoder(clip)

    def from_codes(self, codes: Tensor) -> Tensor:
        """[B, D, T', H', W'] -> [B, 3, T, H, W]."""
        clip, side = self.decoder(codes), self.config.patch
        return F.pixel_shuffle(clip.transpose(1, 2), side).transpose(1, 2) if side > 1 else clip

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, T', H', W'] int64."""
        self.check_clip(pixels)
        return self.quantizer(self.to_latent(pixels).movedim(1, -1)).ids


def _units(inner: int, outer: int, count: int, groups: int) -> list[nn.Module]:
    return [ResidualUnit3d(inner if i == 0 else outer, outer, groups) for i in range(count)]


def _strides(c: NBPTokenizerConfig) -> list[tuple[int, int, int]]:
    """Frames, rows and columns that each halving, fine to coarse, makes one; patches take the place of the first."""
    halves = [1 if c.patch >= 2 ** (i + 1) else 2 for i in range(3)]
    return [(1 if i == 0 else 2, side, side) for i, side in enumerate(halves)]


def _down(width: int, stride: tuple[int, int, int]) -> list[nn.Module]:
    return [CausalConv3d(width, width, stride=stride)] if math.prod(stride) > 1 else []


def _up(width: int, factor: tuple[int, int, int]) -> list[nn.Module]:
    count = math.prod(factor)
    return [CausalConv3d(width, count * width), DepthToSpace(factor)] if count > 1 else []


def _encoder(c: NBPTokenizerConfig) -> list[nn.Module]:
    fine, middle, coarse = c.widths
    first, second, third = _strides(c)
    return [
        CausalConv3d(3 * c.patch**2, fine),
        *_units(fine, fine, c.blocks, c.groups),
        *_down(fine, first),
        *_units(fine, middle, c.blocks, c.groups),
        *_down(middle, second),
        *_units(middle, middle, c.blocks, c.groups),
        *_down(middle, third),
        *_units(middle, coarse, 2 * c.blocks, c.groups),
        FrameGroupNorm(c.groups, coarse),
        Swish(coarse),
        nn.Conv3d(coarse, c.embed, 1),
    ]


def _decoder(c: NBPTokenizerConfig) -> list[nn.Module]:
    fine, middle, coarse = c.widths
    first, second, third = _strides(c)
    return [
        CausalConv3d(c.embed, coarse),
        *_units(coarse, coarse, 2 * c.blocks, c.groups),
        *_up(coarse, third),
        *_units(coarse, middle, c.blocks, c.groups),
        *_up(middle, second),
        *_units(middle, middle, c.blocks, c.groups),
        *_up(middle, first),
        *_units(middle, fine, c.blocks, c.groups),
        FrameGroupNorm(c.groups, fine),
        Swish(fine),
        CausalConv3d(fine, 3 * c.patch**2),
    ]
