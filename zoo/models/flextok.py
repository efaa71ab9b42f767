"""FlexTok: a picture as an ordered sequence of 1 to 256 tokens, decoded by a rectified-flow transformer.

Bachmann et al. 2025 (arXiv 2502.13967) section 3. The released training code and Hub config are not public; what was
reconstructed is a field of the config.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.flextok_vae import FlexTokVAE, FlexTokVAEConfig
from zoo.models.visual import Reconstruction, VisualModel
from zoo.nn.elastic import NestedDropout
from zoo.nn.flow import Guidance, NoiseConfig, add_noise, euler, sample_levels
from zoo.nn.fsq import FSQ, FSQConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig, denormalize, normalize
from zoo.nn.vit import Mask, Modulation, ViT, ViTConfig, modulate


def flextok_vit(width: int, layers: int, head_width: int = 64, adaln: bool = False) -> ViTConfig:
    """FlexTok's transformer: SwiGLU, no biases, norms without gains, normalised queries and keys, muP scale."""
    mlp = MLPConfig(kind="swiglu", width=int(8 / 3 * width), bias=False)
    return ViTConfig(
        width=width, layers=layers, heads=width // head_width, mlp=mlp,
        qkv_bias="none", out_bias=False, qk_norm="plain", scale=8 / head_width, norm_affine=False,
        adaln=adaln, adaln_groups=2 if adaln else 1,
    )  # fmt: skip


@config
class FlexTokConfig:
    """The defaults are FlexTok d12-d12 (341.7 M elements with its VAE).

    Attributes:
        vae: the frozen VAE in front; None when the model is fed latents.
        pixel_space: without a VAE, take the normalised pixels themselves for latents (small pictures).
        channels: of the latents; latent_size their height and width.
        patch: side of the patches of latents.
        encoder: blocks of the register encoder; decoder: of the flow decoder.
        registers: K, the number of tokens.
        fsq: quantizer.
        encoder_positions: of the encoder's patches: fixed sines, or learned rows and columns that are added or
            multiplied.
        decoder_positions: of the decoder's noised patches; unverified for the released weights.
        register_positions: of the decoder's registers.
        nested_dropout: how the number of kept tokens is drawn in training.
        null_probability: how often all tokens of a sample are replaced by a null condition in training.
        noise: levels of the flow in training.
        prediction: `velocity`, or `clean`: the network's output is the clean latent, from which the velocity follows,
            and the loss is its squared error. Patches with more numbers than the decoder is wide need it, since noise
            does not fit through it (Li and He 2025, arXiv 2511.13720).
        time_frequencies: width of the sinusoidal time features; time_period their longest period; time_max the
            value of the timestep at pure noise.
        sample_posterior: tokenise a draw of the VAE's posterior instead of its mode.
        init: of the weights. `default` has registers and learned positions of deviation 0.02, which suits long runs of
            wide models: in a short one all registers say the same, since what they read drowns what tells them apart.
            `scaled` makes them as large as the content, and starts with open gates in place of adaLN-zero.
        preprocess: of pictures.
    """

    vae: FlexTokVAEConfig | None = None
    pixel_space: bool = False
    channels: int = 16
    latent_size: int = 32
    patch: int = 2
    encoder: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=768, layers=12, heads=12, mlp=MLPConfig(kind="swiglu", width=2048, bias=False), qkv_bias="none",
            out_bias=False, qk_norm="plain", scale=0.125, norm_affine=False,
        )
    )  # fmt: skip
    decoder: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=768, layers=12, heads=12, mlp=MLPConfig(kind="swiglu", width=2048, bias=False), qkv_bias="none",
            out_bias=False, qk_norm="plain", scale=0.125, norm_affine=False, adaln=True, adaln_groups=2,
        )
    )  # fmt: skip
    registers: int = 256
    fsq: FSQConfig = field(default_factory=FSQConfig)
    encoder_positions: Literal["sincos", "learnable_sum", "learnable_prod"] = "sincos"
    decoder_positions: Literal["sincos", "learnable_sum", "learnable_prod"] = "sincos"
    register_positions: Literal["sincos", "learnable_sum", "learnable_prod"] = "learnable_sum"
    nested_dropout: Literal["uniform", "pow2", "uniform_pow2"] = "uniform"
    null_probability: float = 0.2
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    prediction: Literal["velocity", "clean"] = "velocity"
    time_frequencies: int = 256
    time_period: float = 256.0
    time_max: float = 1.0
    sample_posterior: bool = False
    init: Literal["default", "scaled"] = "default"
    preprocess: PreprocessConfig = field(
        default_factory=lambda: PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    )

    def __post_init__(self) -> None:
        if self.latent_size % self.patch:
            raise ValueError(f"latents of side {self.latent_size} do not divide into patches of {self.patch}")
        if self.pixel_space and (self.vae is not None or self.channels != 3):
            raise ValueError("pixel_space takes pixels for latents: set channels to 3 and leave the vae out")
        if self.pixel_space and self.latent_size != self.preprocess.size:
            raise ValueError(f"latent_size is {self.latent_size}, but the pixels are {self.preprocess.size} wide")


def sincos_positions(sizes: tuple[int, ...], width: int) -> Tensor:
    """[1, width, *sizes] sines and cosines; in two dimensions one half encodes the row and the other the column."""
    parts = width // len(sizes)
    omega = 10000.0 ** (-torch.arange(parts // 2, dtype=torch.float32) / (parts // 2))
    out = []
    for axis, size in enumerate(sizes):
        angle = torch.arange(size, dtype=torch.float32) * omega[:, None]  # [parts / 2, size]
        waves = torch.cat([angle.sin(), angle.cos()])
        shape = [1] * len(sizes)
        shape[axis] = size
        out.append(waves.reshape(parts, *shape).expand(parts, *sizes))
    return torch.cat(out)[None]


class Positions(nn.Module):
    """Adds position embeddings to [B, *sizes, width]."""

    def __init__(self, kind: str, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "sincos":
            self.register_buffer("table", sincos_positions(sizes, width))
        else:
            self.table = nn.Parameter(0.02 * torch.randn(len(sizes), 1, width, max(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[1:-1]
        if self.kind == "sincos":
            table = self.table[(slice(None), slice(None), *(slice(n) for n in sizes))]
        elif len(sizes) == 1:
            table = self.table[0, :, :, : sizes[0]]
        else:
            rows, columns = self.table[0, :, :, : sizes[0], None], self.table[1, :, :, None, : sizes[1]]
            table = rows + columns if self.kind == "learnable_sum" else rows * columns
        return x + table.movedim(1, -1).to(x.dtype)


class FlexTokEncoder(nn.Module):
    """Latents [B, C, h, w] -> registers [B, K, len(levels)]; register i sees the patches and the registers up to i."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width, grid = config.encoder.width, config.latent_size // config.patch
        self.patch = config.patch
        self.patch_embed = nn.Linear(config.channels * config.patch**2, width)
        self.positions = Positions(config.encoder_positions, (grid, grid), width)
        self.registers = nn.Parameter(0.02 * torch.randn(config.registers, width))
        self.transformer = ViT(config.encoder)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.proj_out = nn.Linear(width, len(config.fsq.levels))

    def pack(self, latents: Tensor) -> Tensor:
        """[B, h·w / p² + K, D]: patches with their positions, then the registers."""
        x = self.positions(self.patch_embed(to_patches(latents, self.patch)))
        return torch.cat([x.flatten(1, 2), self.registers.expand(len(x), -1, -1).to(x.dtype)], 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.pack(latents)
        k = len(self.registers)
        x = self.transformer(x, Mask("prefix", prefix=x.shape[1] - k))
        return self.proj_out(self.norm_out(x[:, -k:]))


class FlexTokDecoder(nn.Module):
    """Velocity of noised latents given quantized registers."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width, grid, patch = config.decoder.width, config.latent_size // config.patch, config.patch
        self.config, self.patch = config, patch
        self.latent_embed = nn.Linear(len(config.fsq.levels), width)
        self.register_positions = Positions(config.register_positions, (config.registers,), width)
        self.nested_dropout = NestedDropout(width, config.nested_dropout)
        self.null = nn.Parameter(0.02 * torch.randn(width))
        self.patch_embed = nn.Linear(config.channels * patch**2, width)
        self.positions = Positions(config.decoder_positions, (grid, grid), width)
        time_in = nn.Linear(config.time_frequencies, width)
        self.time_embed = nn.Sequential(time_in, nn.SiLU(), nn.Linear(width, width))
        self.transformer = ViT(config.decoder)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(width, 2)
        self.proj_out = nn.Linear(width, config.channels * patch**2)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def condition(self, codes: Tensor, keep: Tensor | None, null: Tensor | None) -> Tensor:
        """Codes [B, K, F] -> tokens [B, K, D]: the tail masked from *keep* [B] on, all replaced where *null* [B]."""
        x = self.nested_dropout(self.register_positions(self.latent_embed(codes)), keep)
        if null is None and self.training:
            null = torch.rand(len(x), device=x.device) < self.config.null_probability
        return x if null is None else torch.where(null[:, None, None], self.null.to(x.dtype), x)

    def time(self, t: Tensor) -> Tensor:
        """[B] -> [B, D], in float32 up to the first linear layer."""
        half = self.config.time_frequencies // 2
        rates = torch.exp(-math.log(self.config.time_period) * torch.arange(half, device=t.device) / half)
        # the rates are scaled rather than the time: angles reach 1000, where the order of rounding shows
        angle = t.float()[:, None] * (rates * (1000.0 / self.config.time_max))
        return self.time_embed(torch.cat([angle.cos(), angle.sin()], -1).to(self.proj_out.weight.dtype))

    def forward(
        self, noised: Tensor, t: Tensor, codes: Tensor, keep: Tensor | None = None, null: Tensor | None = None
    ) -> Tensor:
        """noised [B, C, h, w] at times t [B], codes [B, K, F] -> velocity [B, C, h, w]."""
        condition = self.time(t)
        x = self.positions(self.patch_embed(to_patches(noised, self.patch)))
        grid, n = x.shape[1:3], x.shape[1] * x.shape[2]
        x = torch.cat([x.flatten(1, 2), self.condition(codes.to(x.dtype), keep, null)], 1)
        x = self.transformer(x, condition=condition, sizes=(n, codes.shape[1]))[:, :n]
        shift, scale = self.modulation(condition)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))
        x = from_patches(x.unflatten(1, grid), self.patch)
        return x if self.config.prediction == "velocity" else (noised - x) / t.to(x.dtype)[:, None, None, None]


def to_patches(x: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> [B, h / p, w / p, p·p·C]."""
    x = x.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # [B, C, h', p, w', p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches`."""
    x = x.unflatten(3, (patch, patch, -1))  # [B, h', w', p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class FlexTok(VisualModel):
    """Pixels [B, 3, S, S] -> ids [B, K]; any prefix of the ids decodes to a picture, by sampling."""

    ordered = True

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = FlexTokVAE(config.vae) if config.vae is not None else None
        if self.vae is not None:
            self.vae.requires_grad_(False).eval()
        self.encoder = FlexTokEncoder(config)
        self.quantizer = FSQ(config.fsq)
        self.decoder = FlexTokDecoder(config)
        self.vocab_size = self.quantizer.vocab_size
        self.num_tokens = config.registers
        if config.init == "scaled":
            self._scaled_init()

    def _scaled_init(self) -> None:
        """Weights by fan-in, registers, positions and null tokens as large as the content, latents near 0."""
        for part in (self.encoder, self.decoder):
            for name, parameter in part.named_parameters():
                if name.rsplit(".")[-1] in ("registers", "table", "null", "mask_token"):
                    nn.init.normal_(parameter)
                elif parameter.ndim == 2 and not name.startswith("proj_out") and "modulation" not in name:
                    nn.init.trunc_normal_(parameter, std=parameter.shape[1] ** -0.5)
        with torch.no_grad():
            nn.init.trunc_normal_(self.encoder.proj_out.weight, std=0.3 * self.config.encoder.width**-0.5)
            self.decoder.patch_embed.weight.mul_(0.1)  # or noise would drown the positions
            for block in self.decoder.transformer.blocks:
                modulation = block.modulation
                assert isinstance(modulation, Modulation)
                chunks = modulation.proj.bias.view(modulation.groups, modulation.chunks, -1)
                chunks[:, [2, 5]] = 1  # gates of the attention and of the feed-forward network

    def train(self, mode: bool = True) -> FlexTok:
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """VAE latents [B, C, h, w] of pixels [B, 3, S, S] in [0, 1].

        Raises:
            ZooError: the model has no VAE, or pictures of another size.
        """
        if self.config.pixel_space:
            self.check_pixels(pixels)
            return normalize(pixels, self.config.preprocess)
        if self.vae is None:
            raise ZooError("this FlexTok has no VAE and takes latents: use encode_latents and decode_latents")
        self.check_pixels(pixels)
        return self.vae.encode_latents(pixels, self.config.sample_posterior)

    def forward(self, pixels: Tensor | None = None, latents: Tensor | None = None) -> Reconstruction:
        """Training form: flow-matching loss mean((velocity - (noise - latent))²) at random times and token counts, or
        mean((clean - latent)²) where the decoder predicts the clean latent.

        Takes pixels, or cached *latents*; output is the predicted clean latent.
        """
        if latents is None:
            assert pixels is not None
            latents = self.latents(pixels)
        result = self.quantizer(self.encoder(latents))
        noise = torch.randn_like(latents)
        t = sample_levels(self.config.noise, len(latents), latents.device)
        noised = add_noise(latents, noise, t)
        velocity = self.decoder(noised, t, result.codes)
        clean = noised - t[:, None, None, None].to(velocity.dtype) * velocity
        if self.config.prediction == "clean":
            loss = F.mse_loss(clean.float(), latents.float())
        else:
            loss = F.mse_loss(velocity.float(), (noise - latents).float())
        return Reconstruction(clean, result.ids, loss, {"flow_loss": loss.detach()})

    def example_inputs(self) -> dict[str, Tensor]:
        if self.vae is not None or self.config.pixel_space:
            return super().example_inputs()
        c = self.config
        shape = (1, c.channels, c.latent_size, c.latent_size)
        return {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(20))}

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.encode_latents(self.latents(pixels))

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """VAE latents [B, C, h, w] -> ids [B, K]."""
        return self.quantizer(self.encoder(latents)).ids

    @torch.no_grad()
    def decode(
        self,
        ids: Tensor,
        steps: int = 20,
        guidance: Guidance | None = None,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample a picture from ids [B, k], 1 <= k <= K (the published defaults: 20 steps, guidance 7.5, projected).

        Raises:
            ZooError: more than K ids, unknown ids, or no VAE.
        """
        if self.config.pixel_space:
            pixels = self.decode_latents(ids, steps, guidance, keep, generator)
            return denormalize(pixels, self.config.preprocess)
        if self.vae is None:
            raise ZooError("this FlexTok has no VAE and takes latents: use encode_latents and decode_latents")
        return self.vae.decode_latents(self.decode_latents(ids, steps, guidance, keep, generator))

    @torch.no_grad()
    def decode_latents(
        self,
        ids: Tensor,
        steps: int = 20,
        guidance: Guidance | None = None,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Sample latents [B, C, h, w]; *keep* [B] uses fewer ids of some samples, *start* is the first noise."""
        self.check_ids(ids)
        batch, k = ids.shape
        if k > self.num_tokens or k < 1:
            raise ZooError(f"FlexTok decodes 1 to {self.num_tokens} ids, got {k}")
        c = self.config
        codes = F.pad(self.quantizer.lookup(ids), (0, 0, 0, self.num_tokens - k))
        keep = torch.full((batch,), k, device=ids.device) if keep is None else keep.clamp(max=k)
        if start is None:
            shape = (batch, c.channels, c.latent_size, c.latent_size)
            start = torch.randn(shape, device=ids.device, generator=generator).to(self.decoder.proj_out.weight.dtype)
        always, never = (
            torch.ones(batch, dtype=torch.bool, device=ids.device),
            torch.zeros(batch, dtype=torch.bool, device=ids.device),
        )

        def velocity(x: Tensor, t: Tensor, unconditional: bool) -> Tensor:
            return self.decoder(x, t, codes, keep, always if unconditional else never)

        return euler(velocity, start, steps, guidance or Guidance(7.5, projected=True))
