"""MaskGIT-VQGAN: the 16x16-token convolutional tokenizer behind TiTok, RAR and MaskGIT.

Chang et al. 2022 (MaskGIT, arXiv 2202.04200) section 3.1; the PyTorch weights are the ones 1d-tokenizer distributes.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.visual import Reconstruction, VisualModel
from zoo.nn.conv2d import ConvDecoder, ConvEncoder, ConvStackConfig
from zoo.nn.preprocess import PreprocessConfig, normalize
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


def maskgit_stack(
    hidden: int, mult: tuple[int, ...], blocks: int, z_channels: int, channels: int = 3
) -> ConvStackConfig:
    """The convolution stack of MaskGIT-VQGAN: bias-free residual blocks, average pooling, no attention."""
    return ConvStackConfig(
        channels=channels, widths=tuple(hidden * m for m in mult), blocks=blocks, decoder_blocks=blocks,
        mid_blocks=blocks,
        z_channels=z_channels, bias=False, down="avg_pool", out_kernel=1, shortcut="output",
    )  # fmt: skip


@config
class MaskGITVQGANConfig:
    """The defaults are the released f16 model (54.5 M elements).

    Attributes:
        stack: encoder and decoder.
        quantizer: its loss weighs the codebook term by 0.25 and the commitment term by 1, as the official code does.
        preprocess: of pictures.
    """

    stack: ConvStackConfig = field(
        default_factory=lambda: ConvStackConfig(bias=False, down="avg_pool", out_kernel=1, shortcut="output")
    )
    quantizer: VectorQuantizerConfig = field(
        default_factory=lambda: VectorQuantizerConfig(size=1024, dim=256, commitment=1.0, codebook=0.25)
    )
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)


class MaskGITVQGAN(VisualModel):
    """Pixels [B, 3, H, W] <-> ids [B, (H / f)·(W / f)] in row-major order; sides must be multiples of f."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config.stack)
        self.decoder = ConvDecoder(config.stack)
        self.quantizer = VectorQuantizer(config.quantizer)
        self.factor = 2 ** (len(config.stack.widths) - 1)
        self.vocab_size = config.quantizer.size
        self.num_tokens = (config.preprocess.size // self.factor) ** 2

    def forward(self, pixels: Tensor) -> Reconstruction:
        """Training form.

        Raises:
            ZooError: sides that are no multiples of the reduction factor.
        """
        self.check_pixels(pixels, self.factor)
        z = self.encoder(normalize(pixels, self.config.preprocess))  # [B, D, h, w]
        result = self.quantizer(z.movedim(1, -1))
        output = self.decoder(result.codes.movedim(-1, 1).to(z.dtype))
        return Reconstruction(output, result.ids.flatten(1), result.loss, result.parts)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels, self.factor)
        z = self.encoder(normalize(pixels, self.config.preprocess)).movedim(1, -1).float()  # [B, h, w, D]
        nearest = self.quantizer.nearest(z.reshape(-1, z.shape[-1]), self.quantizer.embedding.weight.float())
        return nearest.reshape(len(z), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """*grid* is (rows, columns) of a picture that is not square."""
        self.check_ids(ids)
        side = round(ids.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        if rows * columns != ids.shape[1]:
            raise ZooError(f"{ids.shape[1]} ids do not fill a grid of {rows} x {columns}; pass grid=(rows, columns)")
        codes = self.quantizer.lookup(ids).unflatten(1, (rows, columns))  # [B, h, w, D]
        return self.decoder(codes.movedim(-1, 1))

    def soft_codes(self, pixels: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, h·w, V]: softmax(-distance² / temperature) of each position over the codebook."""
        z = self.encoder(normalize(pixels, self.config.preprocess)).flatten(2).transpose(1, 2)
        return self.quantizer.soft_assign(z, temperature)

    def proxy_loss(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """Cross-entropy of proxy-code logits [B, V, h, w] against this tokenizer's ids of *pixels* (TiTok stage 1)."""
        return F.cross_entropy(logits.flatten(2), self.encode(pixels))
