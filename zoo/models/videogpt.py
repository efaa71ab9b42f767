"""VideoGPT's VQ-VAE: strided 3-D convolutions, axial attention, and a codebook of moving averages.

Yan et al. 2021, VideoGPT: Video Generation using VQ-VAE and Transformers, arXiv:2104.10157, section 3.1. It is not
causal in time: every token sees all frames.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.models.video import ConvVideoModel
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


@config
class VideoGPTConfig:
    """The defaults are the size of the released tokenizers.

    Attributes:
        width: channels throughout.
        layers: residual blocks of the encoder, and of the decoder.
        heads: of the axial attention.
        downsample: factors in time, height and width, powers of 2.
        quantizer: its dimension is the width of the codes.
    """

    width: int = 240
    layers: int = 4
    heads: int = 2
    downsample: tuple[int, int, int] = (4, 4, 4)
    quantizer: VectorQuantizerConfig = field(
        default_factory=lambda: VectorQuantizerConfig(size=2048, dim=256, update="ema")
    )

    def __post_init__(self) -> None:
        if any(d < 1 or d & (d - 1) for d in self.downsample) or max(self.downsample) < 2:
            raise ValueError(f"downsample must be powers of 2, not all 1, got {list(self.downsample)}")

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """Strides of the convolutions, from the pixels inwards; an axis stops halving when it has its factor."""
        count = max(self.downsample).bit_length() - 1
        t, h, w = self.downsample
        return tuple((2 if t > 1 << i else 1, 2 if h > 1 << i else 1, 2 if w > 1 << i else 1) for i in range(count))


def front_pad(x: Tensor, kernel: int, stride: tuple[int, int, int]) -> Tensor:
    """Zero-pad [B, C, T, H, W] by kernel - stride; an odd cell goes in front."""
    pads: list[int] = []
    for s in stride:
        total = kernel - s
        pads = [total // 2 + total % 2, total // 2, *pads]
    return F.pad(x, pads) if any(pads) else x


class SameConv3d(nn.Module):
    """A convolution whose output is the input's size over the stride."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1), bias: bool = True
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv3d(inner, outer, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(front_pad(x, self.kernel, self.stride))


class SameConvTranspose3d(nn.Module):
    """A transposed convolution whose output is the input's size times the stride."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.convt = nn.ConvTranspose3d(inner, outer, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(front_pad(x, self.kernel, self.stride))


class LineAttention(nn.Module):
    """Attention along one axis of [B, T, H, W, C]; the other axes are further rows of the batch."""

    def __init__(self, width: int, heads: int, axis: int) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -2)  # [..., L, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        shape = (-1, *q.shape[-3:])  # the kernel takes one axis for the batch
        y = F.scaled_dot_product_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(q.shape)
        return self.out_proj(y.transpose(-2, -3).flatten(-2)).movedim(-2, self.axis)


class AxialBlock(nn.Module):
    """x + attention along width, height and time, after a bottleneck of two convolutions; [B, C, T, H, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm3d(width), SameConv3d(width, width // 2, 3, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm3d(width // 2), SameConv3d(width // 2, width, 1, bias=False)
        self.norm3 = nn.BatchNorm3d(width)
        self.along_w = LineAttention(width, heads, 3)
        self.along_h = LineAttention(width, heads, 2)
        self.along_t = LineAttention(width, heads, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        h = F.relu(self.norm3(h)).movedim(1, -1)
        return x + (self.along_w(h) + self.along_h(h) + self.along_t(h)).movedim(-1, 1)


class Trunk(nn.Module):
    """The residual blocks, a batch norm and ReLU."""

    def __init__(self, config: VideoGPTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AxialBlock(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.BatchNorm3d(config.width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.relu(self.norm(x))


class VideoGPT(ConvVideoModel):
    """Clips [B, 3, T, H, W] in [0, 1] <-> ids [B, T / t, H / h, W / w]."""

    span = (-0.5, 0.5)
    lone_first = False

    def __init__(self, config: VideoGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.downsample
        self.vocab_size = config.quantizer.size
        width, strides = config.width, config.strides
        self.down = nn.ModuleList(SameConv3d(3 if i == 0 else width, width, 4, s) for i, s in enumerate(strides))
        self.down_last = SameConv3d(width, width, 3)
        self.encoder = Trunk(config)
        self.pre = SameConv3d(width, config.quantizer.dim, 1)
        self.quantizer = VectorQuantizer(config.quantizer)
        self.post = SameConv3d(config.quantizer.dim, width, 1)
        self.decoder = Trunk(config)
        last = len(strides) - 1
        self.up = nn.ModuleList(
            SameConvTranspose3d(width, 3 if i == last else width, 4, s) for i, s in enumerate(strides)
        )

    def to_latent(self, x: Tensor) -> Tensor:
        """Clips on the network's own scale -> [B, D, T', H', W'] before quantization."""
        for conv in self.down:
            x = F.relu(conv(x))
        return self.pre(self.encoder(self.down_last(x)))

    def from_codes(self, codes: Tensor) -> Tensor:
        """[B, D, T', H', W'] -> clips on the network's own scale."""
        x = self.decoder(self.post(codes))
        for i, conv in enumerate(self.up):
            x = conv(x) if i == len(self.up) - 1 else F.relu(conv(x))
        return x

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, T', H', W'] int64."""
        self.check_clip(pixels)
        z = self.to_latent(self.normalized(pixels)).movedim(1, -1).float()
        ids = self.quantizer.nearest(z.flatten(0, 3), self.quantizer.embedding.weight.float())
        return ids.reshape(z.shape[:-1])
