"""OmniTokenizer: one transformer that tokenizes pictures and clips, with a codebook or as a VAE.

Wang et al. 2024, arXiv:2406.09399, section 3. A picture is a clip of one frame, but its tokens are not those of a
clip's first frame: the temporal blocks' positional convolution mixes space and time (see `zoo.nn.omni`).
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.video import VideoModel
from zoo.models.visual import Reconstruction
from zoo.nn.omni import GainNorm, OmniBlock
from zoo.nn.vae_bottleneck import DiagonalGaussian
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


@config
class OmniTokenizerConfig:
    """The defaults are the released video tokenizers (4x8x8 pixels a token, 8,192 codes).

    Attributes:
        width, heads, head_dim: of the blocks.
        patch: frames, rows and columns of a token; the first frame has patches of one frame.
        encoder, decoder: spatial blocks, `t` for attention over the frame and `w` for attention in windows.
        temporal: temporal blocks of either side.
        window: side of a window in tokens.
        position: of the spatial `t` blocks: `rotary`, or `stored`, a relative bias that the weights hold but that was
            never applied, so that such a model has no positions there beside the convolution.
        mlp_mult: two thirds of it is the width of the feed-forward's inside.
        causal, causal_position: attention along time, and positional convolutions, see earlier frames alone.
        quantizer: codebook, whose `dim` is also the number of channels of the VAE's latents.
        vae: make continuous latents instead of ids; the released VAEs hold a codebook all the same.
        unit_latent: put latents on the unit sphere before they are quantized (the codes are not).
        kl_weight: of the VAE's divergence.
    """

    width: int = 512
    heads: int = 8
    head_dim: int = 64
    patch: tuple[int, int, int] = (4, 8, 8)
    encoder: str = "ttww"
    decoder: str = "tttt"
    temporal: int = 4
    window: int = 8
    position: Literal["rotary", "stored"] = "rotary"
    mlp_mult: float = 4.0
    causal: bool = True
    causal_position: bool = True
    quantizer: VectorQuantizerConfig = field(
        default_factory=lambda: VectorQuantizerConfig(size=8192, dim=8, update="ema")
    )
    vae: bool = False
    unit_latent: bool = True
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            if not set(getattr(self, name)) <= set("tw"):
                raise ValueError(f"{name} is a row of 't' and 'w', got '{getattr(self, name)}'")
        if "w" in self.encoder + self.decoder and self.width % self.heads:
            raise ValueError(f"window blocks need a width that the {self.heads} heads divide, got {self.width}")


class Stack(nn.Module):
    """Blocks, then a norm."""

    def __init__(self, c: OmniTokenizerConfig, kinds: str, spatial: bool) -> None:
        super().__init__()
        rotary = spatial and c.position == "rotary"
        self.blocks = nn.ModuleList(
            OmniBlock(
                kind, c.width, c.heads, c.head_dim, mult=c.mlp_mult, window=c.window, rotary=rotary,
                causal=c.causal and not spatial, causal_position=c.causal_position, stored_bias=not rotary,
            )
            for kind in kinds
        )  # fmt: skip
        self.norm = GainNorm(c.width)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        for block in self.blocks:
            x = block(x, shape)
        return self.norm(x)


class Embed(nn.Sequential):
    """Patches [..., p] -> [..., D]: norm, linear map, norm."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__(nn.LayerNorm(inner), nn.Linear(inner, width), nn.LayerNorm(width))


def to_patches(clip: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, T / t, H / h, W / w, C t h w]."""
    for axis, size in zip((2, 4, 6), patch, strict=True):
        clip = clip.unflatten(axis, (-1, size))
    return clip.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def from_patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_patches`."""
    x = x.unflatten(-1, (-1, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, T', t, H', h, W', w]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def time_last(x: Tensor) -> Tensor:
    """[B, T, H, W, D] -> [B H W, T, D]."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2)


class OmniEncoder(nn.Module):
    """Clips [B, 3, T, H, W] -> [B, T', H', W', D]."""

    def __init__(self, c: OmniTokenizerConfig) -> None:
        super().__init__()
        t, h, w = self.patch = c.patch
        self.first, self.rest = Embed(3 * h * w, c.width), Embed(3 * t * h * w, c.width)
        self.spatial, self.temporal = Stack(c, c.encoder, True), Stack(c, "t" * c.temporal, False)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.first(to_patches(clip[:, :, :1], (1, *self.patch[1:])))
        if clip.shape[2] > 1:
            x = torch.cat([x, self.rest(to_patches(clip[:, :, 1:], self.patch))], 1)
        batch, frames, rows, columns, _ = shape = x.shape
        grid = (batch, frames, rows, columns)
        x = self.spatial(x.flatten(2, 3).flatten(0, 1), grid).reshape(shape)
        x = self.temporal(time_last(x), grid)
        return x.reshape(batch, rows, columns, frames, -1).permute(0, 3, 1, 2, 4)


class OmniDecoder(nn.Module):
    """[B, T', H', W', D] -> clips [B, 3, T, H, W]."""

    def __init__(self, c: OmniTokenizerConfig) -> None:
        super().__init__()
        t, h, w = self.patch = c.patch
        self.spatial, self.temporal = Stack(c, c.decoder, True), Stack(c, "t" * c.temporal, False)
        self.first, self.rest = nn.Linear(c.width, 3 * h * w), nn.Linear(c.width, 3 * t * h * w)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, rows, columns, _ = shape = x.shape
        grid = (batch, frames, rows, columns)
        x = self.temporal(time_last(x), grid).reshape(batch, rows, columns, frames, -1).permute(0, 3, 1, 2, 4)
        x = self.spatial(x.flatten(2, 3).flatten(0, 1), grid).reshape(shape)
        first = from_patches(self.first(x[:, :1]), (1, *self.patch[1:]))
        return first if frames == 1 else torch.cat([first, from_patches(self.rest(x[:, 1:]), self.patch)], 2)


class OmniTokenizer(VideoModel):
    """Clips [B, 3, 1 + 4n, 8h, 8h] in [0, 1] <-> ids [B, 1 + n, h, h], or latents of the VAE; frames are square."""

    span = (-0.5, 0.5)
    usage: Tensor

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.patch
        self.encoder, self.decoder = OmniEncoder(config), OmniDecoder(config)
        dim = config.quantizer.dim
        self.vocab_size = None if config.vae else config.quantizer.size
        self.pre = nn.Linear(config.width, 2 * dim if config.vae else dim)
        self.post = nn.Linear(dim, config.width)
        self.quantizer = VectorQuantizer(config.quantizer)
        if config.vae:
            self.quantizer.requires_grad_(False)
        # the official code's moving share of each code among the tokens; nothing reads it
        self.register_buffer("usage", torch.zeros(config.quantizer.size))

    @property
    def last_layer(self) -> Tensor:
        """Weights of the map to pixels, which an adaptive adversarial weight looks at."""
        return self.decoder.rest.weight

    def check_clip(self, clip: Tensor) -> None:
        """As `VideoModel.check_clip`; frames must be square, and whole windows."""
        super().check_clip(clip)
        c, side = self.config, clip.shape[3] // self.factor[1]
        if clip.shape[3] != clip.shape[4]:
            raise ZooError(f"OmniTokenizer takes square frames, got {clip.shape[3]} x {clip.shape[4]}")
        if "w" in c.encoder + c.decoder and side % c.window:
            raise ZooError(f"frames of {side} x {side} tokens are no whole windows of {c.window}")

    def to_latent(self, x: Tensor) -> Tensor:
        """Clips on the network's own scale -> [B, T', H', W', d]: latents, or the VAE's moments side by side."""
        z = self.pre(self.encoder(x))
        return F.normalize(z, dim=-1) if self.config.unit_latent and not self.config.vae else z

    def from_latent(self, z: Tensor) -> Tensor:
        """[B, T', H', W', d] -> clips on the network's own scale."""
        return self.decoder(self.post(z))

    def forward(self, clip: Tensor) -> Reconstruction:
        """Training form.

        Raises:
            ZooError: a clip whose sizes the patches or windows do not divide.
        """
        self.check_clip(clip)
        z = self.to_latent(self.normalized(clip))
        if self.config.vae:
            law = DiagonalGaussian(z, -1)
            kl = law.kl((1, 2, 3, 4)).mean()
            drawn = law.sample() if self.training else law.mode()
            output = self.pixels(self.from_latent(drawn.to(z.dtype)))
            return Reconstruction(output, None, self.config.kl_weight * kl, {"kl": kl})
        result = self.quantizer(z)
        output = self.pixels(self.from_latent(result.codes.to(z.dtype)))
        return Reconstruction(output, result.ids, result.loss, result.parts)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, T', H', W'] int64; raises ZooError for a VAE."""
        if self.config.vae:
            raise self.continuous()
        self.check_clip(pixels)
        z = self.to_latent(self.normalized(pixels)).float()
        return self.quantizer.nearest(z.flatten(0, 3), self.quantizer.embedding.weight.float()).reshape(z.shape[:-1])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """[B, T', H', W'] -> [B, 3, T, H, W], nominally in [0, 1], unclamped; raises ZooError for a VAE."""
        if self.config.vae:
            raise self.continuous()
        self.check_ids(ids)
        return self.pixels(self.from_latent(self.quantizer.lookup(ids)))

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, T', H', W', d]: the VAE's means, or the vectors before quantization."""
        self.check_clip(pixels)
        z = self.to_latent(self.normalized(pixels))
        return DiagonalGaussian(z, -1).mode() if self.config.vae else z

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_latents`, unclamped."""
        return self.pixels(self.from_latent(latents))
