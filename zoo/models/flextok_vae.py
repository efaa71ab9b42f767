"""FlexTok's VAE: the AutoencoderKL of latent diffusion with 8x reduction and 4, 8 or 16 latent channels.

Rombach et al. 2022 (arXiv 2112.10752) appendix E; FlexTok (arXiv 2502.13967) appendix C.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.models.visual import Reconstruction, VisualModel
from zoo.nn.conv2d import ConvDecoder, ConvEncoder, ConvStackConfig
from zoo.nn.preprocess import PreprocessConfig, denormalize, normalize
from zoo.nn.vae_bottleneck import DiagonalGaussian


@config
class FlexTokVAEConfig:
    """The defaults are EPFL-VILAB/flextok_vae_c16 (83.8 M elements), whose Hub config.json could not be read.

    Attributes:
        stack: encoder and decoder; a decoder level has one block more.
        scaling_factor: latents are the posterior's values times this (1 where the file gave none).
        kl_weight: of the KL divergence, summed over a picture, in the training loss.
        preprocess: of pictures; the network sees [-1, 1].
        official: fields of the official config that change nothing here, kept for writing it back.
    """

    stack: ConvStackConfig = field(
        default_factory=lambda: ConvStackConfig(
            widths=(128, 256, 512, 512), decoder_blocks=3, z_channels=16, mid_attention=True
        )
    )
    scaling_factor: float | None = None
    kl_weight: float = 1e-6
    preprocess: PreprocessConfig = field(
        default_factory=lambda: PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    )
    official: dict[str, Any] = field(default_factory=dict)


class FlexTokVAE(VisualModel):
    """Pixels [B, 3, H, W] in [0, 1] <-> latents [B, C, H / f, W / f]; a continuous tokenizer without ids."""

    def __init__(self, config: FlexTokVAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.stack.z_channels
        self.encoder = ConvEncoder(config.stack, out_channels=2 * z)
        self.decoder = ConvDecoder(config.stack)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.factor = 2 ** (len(config.stack.widths) - 1)
        self.scale = 1.0 if config.scaling_factor is None else config.scaling_factor
        self.vocab_size = None
        self.num_tokens = (config.preprocess.size // self.factor) ** 2

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(latent | picture) of x [B, 3, H, W], already normalised to [-1, 1]; not scaled."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def reconstruct(self, z: Tensor) -> Tensor:
        """Unscaled latents -> picture in the network's own range [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, pixels: Tensor) -> Reconstruction:
        """Training form: a sample of the posterior, decoded; loss = kl_weight · mean KL."""
        self.check_pixels(pixels, self.factor)
        posterior = self.posterior(normalize(pixels, self.config.preprocess))
        z = posterior.sample() if self.training else posterior.mode()
        kl = posterior.kl().mean()
        output = denormalize(self.reconstruct(z.to(pixels.dtype)), self.config.preprocess)
        return Reconstruction(output, None, self.config.kl_weight * kl, {"kl": kl})

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor, sample: bool = False) -> Tensor:
        """Scaled latents [B, C, h, w]; the mode of the posterior unless *sample* (FlexTok's published default)."""
        self.check_pixels(pixels, self.factor)
        posterior = self.posterior(normalize(pixels, self.config.preprocess))
        return ((posterior.sample() if sample else posterior.mode()) * self.scale).to(pixels.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels in [0, 1], unclamped."""
        return denormalize(self.reconstruct(latents / self.scale), self.config.preprocess)

    def encode(self, pixels: Tensor) -> Tensor:
        """Raises ZooError: there are no ids."""
        raise self.continuous()

    def decode(self, ids: Tensor) -> Tensor:
        """Raises ZooError: there are no ids."""
        raise self.continuous()
