"""TiTok: a picture as 32 to 256 one-dimensional tokens; TA-TiTok adds the caption to the decoder.

Yu et al. 2024 (arXiv 2406.07550) section 3; Kim et al. 2025 (TA-TiTok, arXiv 2501.07730) section 3.1.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.maskgit_vqgan import MaskGITVQGAN
from zoo.models.visual import Reconstruction, VisualModel, trunc_normal_init
from zoo.nn.conv2d import ConvDecoder, ConvStackConfig
from zoo.nn.fsq import FSQ, FSQConfig
from zoo.nn.preprocess import PreprocessConfig, denormalize, normalize
from zoo.nn.vae_bottleneck import DiagonalGaussian
from zoo.nn.vit import ViT, ViTConfig
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


@config
class TiTokConfig:
    """The defaults are TiTok-S-128 in its one-stage form.

    Attributes:
        encoder: blocks of the encoder; decoder: of the decoder.
        encoder_patch: side of the encoder's patches in pixels; decoder_patch: of the decoder's.
        latents: K, the number of tokens.
        bottleneck: `vq`; `vae` (continuous latents of the quantizer's `dim` channels); or `fsq`, which has no codebook
            that could collapse and suits small data.
        quantizer: codebook of `vq`; fsq: levels of `fsq`.
        kl_weight: of the VAE's KL divergence, summed over a picture.
        target: `pixels` (one-stage), or `proxy` (stage 1: logits of `proxy_codes` MaskGIT-VQGAN codes a patch).
        proxy_codes: size of that codebook.
        pixel_decoder: stage 2: the decoder that turns the softmax mixture of proxy codes into pixels.
        legacy_reshape: read the latents [K, W] as [W, K] in memory order before the last projection, as the released
            L-32, B-64 and S-128 weights need.
        init: of the weights. `published` (deviation 0.02, tokens width^-0.5) is for widths of 512 and more. In a narrow
            model it drowns positions in content and lets the first steps, which learn the mean picture, push the
            latents into one corner of the codebook; `scaled` does neither.
        text_length: caption tokens that the decoder sees (TA-TiTok), 0 for none; text_width is theirs.
        preprocess: of pictures.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: ViTConfig = field(default_factory=ViTConfig)
    encoder_patch: int = 16
    decoder_patch: int = 16
    latents: int = 128
    bottleneck: Literal["vq", "vae", "fsq"] = "vq"
    quantizer: VectorQuantizerConfig = field(default_factory=lambda: VectorQuantizerConfig(size=8192, dim=64))
    fsq: FSQConfig | None = None
    kl_weight: float = 1e-6
    target: Literal["pixels", "proxy"] = "pixels"
    proxy_codes: int = 1024
    pixel_decoder: ConvStackConfig | None = None
    legacy_reshape: bool = False
    init: Literal["published", "scaled"] = "published"
    text_length: int = 0
    text_width: int = 768
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self) -> None:
        for patch in (self.encoder_patch, self.decoder_patch):
            if self.preprocess.size % patch:
                raise ValueError(f"pictures of {self.preprocess.size} pixels do not divide into patches of {patch}")
        if self.pixel_decoder is not None and self.target != "proxy":
            raise ValueError("a pixel_decoder reads proxy codes: set target to 'proxy' or leave it out")
        if (self.fsq is not None) != (self.bottleneck == "fsq"):
            raise ValueError("a bottleneck of kind 'fsq' needs the levels of 'fsq', and no other kind takes them")

    @property
    def code_width(self) -> int:
        """Numbers a token carries."""
        return len(self.fsq.levels) if self.fsq is not None else self.quantizer.dim


def _tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(count, width))


class TiTokEncoder(nn.Module):
    """Pixels [B, 3, S, S] -> [B, K, C]: a ViT over class token, patches and K latent tokens, of which the last stay."""

    def __init__(self, config: TiTokConfig, channels: int) -> None:
        super().__init__()
        width, patch = config.encoder.width, config.encoder_patch
        self.legacy_reshape = config.legacy_reshape
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = _tokens(1, width)
        self.pos_embed = _tokens((config.preprocess.size // patch) ** 2 + 1, width)
        self.latent_tokens = _tokens(config.latents, width)
        self.latent_pos = _tokens(config.latents, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = ViT(config.encoder)
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B, g², W]
        batch = len(x)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], 1) + self.pos_embed
        latents = (self.latent_tokens + self.latent_pos).expand(batch, -1, -1)
        x = self.transformer(self.norm_in(torch.cat([x, latents], 1)))  # [B, 1 + g² + K, W]
        x = self.norm_out(x[:, -latents.shape[1] :])
        if self.legacy_reshape:
            x = x.reshape(batch, x.shape[2], x.shape[1]).transpose(1, 2)
        return self.proj_out(x)


class TiTokDecoder(nn.Module):
    """Latents [B, K, C] (and caption states) -> pixels [B, 3, S, S], or proxy logits [B, V, g, g]."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width, patch = config.decoder.width, config.decoder_patch
        self.grid, self.patch = config.preprocess.size // patch, patch
        self.latent_embed = nn.Linear(config.code_width, width)
        self.cls_token = _tokens(1, width)
        self.mask_token = _tokens(1, width)
        self.pos_embed = _tokens(self.grid**2 + 1, width)
        self.latent_pos = _tokens(config.latents, width)
        if config.text_length:
            self.text_proj = nn.Linear(config.text_width, width)
            self.text_pos = _tokens(config.text_length, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = ViT(config.decoder)
        self.norm_out = nn.LayerNorm(width)
        self.head: nn.Module
        self.conv_out: nn.Module
        if config.target == "proxy":
            self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.proxy_codes))
            self.conv_out = nn.Identity()
        else:
            self.head = nn.Linear(width, 3 * patch**2)
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.proxy = config.target == "proxy"

    def forward(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        batch, count = latents.shape[:2]
        masks = self.mask_token.expand(batch, self.grid**2, -1)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), masks], 1) + self.pos_embed
        parts = [x.to(latents.dtype), self.latent_embed(latents) + self.latent_pos[:count]]
        if text is not None:
            parts.append(self.text_proj(text) + self.text_pos[: text.shape[1]])
        x = self.transformer(self.norm_in(torch.cat(parts, 1)))
        x = self.norm_out(x[:, 1 : 1 + self.grid**2])
        return self.conv_out(self.to_grid(self.head(x)))

    def to_grid(self, x: Tensor) -> Tensor:
        """[B, g², C] -> [B, C, g, g], or the picture of patches whose entries are ordered (row, column, channel)."""
        x = x.unflatten(1, (self.grid, self.grid))
        if self.proxy:
            return x.permute(0, 3, 1, 2)
        x = x.unflatten(-1, (self.patch, self.patch, 3))  # [B, h, w, p, p, 3]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer."""
        last = self.conv_out if isinstance(self.conv_out, nn.Conv2d) else self.head[2]  # type: ignore[index]
        return last.weight


class TiTok(VisualModel):
    """Pixels [B, 3, S, S] <-> ids [B, K] (or latents [B, K, C] where the bottleneck is a VAE)."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.config = config
        vae = config.bottleneck == "vae"
        self.encoder = TiTokEncoder(config, (1 + vae) * config.code_width)
        self.decoder = TiTokDecoder(config)
        self.apply(trunc_normal_init)
        if config.init == "scaled":
            self._scaled_init()
        self.quantizer: VectorQuantizer | FSQ | None = None
        if not vae:
            self.quantizer = FSQ(config.fsq) if config.fsq is not None else VectorQuantizer(config.quantizer)
        self.pixel_codebook: nn.Embedding | None = None
        self.pixel_decoder: ConvDecoder | None = None
        if config.pixel_decoder is not None:
            self.pixel_codebook = nn.Embedding(config.proxy_codes, config.pixel_decoder.z_channels)
            self.pixel_decoder = ConvDecoder(config.pixel_decoder)
        self.vocab_size = None if self.quantizer is None else self.quantizer.vocab_size
        self.num_tokens = config.latents

    def _scaled_init(self) -> None:
        """Weights by fan-in, tokens and positions as large as the content, latents near 0, the mean picture out."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters(recurse=False):
                nn.init.normal_(parameter)
        with torch.no_grad():
            self.encoder.proj_out.weight.mul_(0.3)
        if isinstance(self.decoder.head, nn.Linear):
            nn.init.zeros_(self.decoder.head.weight)

    def forward(self, pixels: Tensor, text: Tensor | None = None) -> Reconstruction:
        """Training form: pixels (and caption states [B, T, E]) -> reconstruction (or proxy logits in stage 1).

        Raises:
            ZooError: pictures of another size, or a caption missing or not wanted.
        """
        self.check_pixels(pixels)
        z = self.encoder(normalize(pixels, self.config.preprocess))
        if self.quantizer is not None:
            result = self.quantizer(z)
            output = self.decode_latents(result.codes.to(z.dtype), text)
            return Reconstruction(output, result.ids, result.loss, result.parts)
        posterior = DiagonalGaussian(z, dim=-1)
        latents = posterior.sample() if self.training else posterior.mode()
        kl = posterior.kl((1, 2)).mean()
        output = self.decode_latents(latents.to(z.dtype), text)
        return Reconstruction(output, None, self.config.kl_weight * kl, {"kl": kl})

    def proxy_logits(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """The transformer decoder alone: [B, K, C] -> its head's output."""
        wanted = self.config.text_length
        if (text is not None) != bool(wanted):
            built, given = ("with", "none were") if wanted else ("without", "some were")
            raise ZooError(f"TiTok was built {built} captions, but {given} given")
        if text is not None and text.shape[1:] != (wanted, self.config.text_width):
            raise ZooError(
                f"TiTok takes caption states [B, {wanted}, {self.config.text_width}], got {list(text.shape)}"
            )
        return self.decoder(latents, text)

    def mix_proxies(self, logits: Tensor) -> Tensor:
        """Proxy logits [B, V, h, w] -> [B, z, h, w]: the mean pixel code under their softmax; there is no argmax."""
        assert self.pixel_codebook is not None
        return torch.einsum("bvhw,vz->bzhw", logits.softmax(1), self.pixel_codebook.weight)

    def decode_latents(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, K, C] -> pixels in [0, 1], unclamped (proxy logits for a stage-1 model)."""
        x = self.proxy_logits(latents, text)
        if self.pixel_decoder is not None:
            x = self.pixel_decoder(self.mix_proxies(x))
        elif self.config.target == "proxy":
            return x
        return denormalize(x, self.config.preprocess)

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor, sample: bool = False) -> Tensor:
        """[B, 3, S, S] -> [B, K, C]: codes of the ids, or the posterior's mode (a draw with *sample*) of a VAE."""
        self.check_pixels(pixels)
        z = self.encoder(normalize(pixels, self.config.preprocess))
        if self.quantizer is not None:
            return self.quantizer.lookup(self.encode(pixels)).to(z.dtype)
        posterior = DiagonalGaussian(z, dim=-1)
        return (posterior.sample() if sample else posterior.mode()).to(z.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        if self.quantizer is None:
            raise self.continuous()
        z = self.encoder(normalize(pixels, self.config.preprocess)).float()
        if isinstance(self.quantizer, FSQ):
            return self.quantizer(z).ids
        weight = self.quantizer.embedding.weight.float()
        if self.config.quantizer.l2_norm:
            z, weight = F.normalize(z, dim=-1), F.normalize(weight, dim=-1)
        return self.quantizer.nearest(z.flatten(0, 1), weight).unflatten(0, z.shape[:2])

    @torch.no_grad()
    def decode(self, ids: Tensor, text: Tensor | None = None) -> Tensor:
        self.check_ids(ids)
        if self.config.target == "proxy" and self.pixel_decoder is None:
            raise ZooError(
                "a stage-1 TiTok predicts proxy codes and cannot decode pixels; add the pixel decoder with to_stage2"
            )
        assert self.quantizer is not None
        return self.decode_latents(self.quantizer.lookup(ids), text)

    def example_inputs(self) -> dict[str, Tensor]:
        inputs = super().example_inputs()
        if self.config.text_length:
            shape = (1, self.config.text_length, self.config.text_width)
            inputs["text"] = torch.randn(shape, generator=torch.Generator().manual_seed(21))
        return inputs

    def adopt_vqgan(self, vqgan: MaskGITVQGAN) -> None:
        """Copy the codebook and the decoder of a MaskGIT-VQGAN into the pixel decoder of a stage 2.

        Raises:
            ZooError: they are of other shapes.
        """
        config = self.config
        same = (vqgan.config.quantizer.size, vqgan.config.stack) == (config.proxy_codes, config.pixel_decoder)
        if self.pixel_decoder is None or self.pixel_codebook is None or not same:
            raise ZooError("the MaskGIT-VQGAN is of another shape than model.pixel_decoder and model.proxy_codes say")
        self.pixel_decoder.load_state_dict(vqgan.decoder.state_dict())
        self.pixel_codebook.weight.data.copy_(vqgan.quantizer.embedding.weight.detach())

    def adopt_stage1(self, source: TiTok) -> bool:
        """Copy encoder, codebook and transformer decoder of a stage-1 model into this stage-2 one, if they are that.

        The pixel decoder stays as it is: `adopt_vqgan` fills it.
        """
        if self.pixel_decoder is None or replace(self.config, pixel_decoder=None) != source.config:
            return False
        pixel = {name: value for name, value in self.state_dict().items() if name.startswith("pixel_")}
        self.load_state_dict(source.state_dict() | pixel)
        return True

    def freeze_encoder(self) -> None:
        """Stage 2 trains the decoders only: encoder, latent tokens and codebook stand still."""
        self.encoder.requires_grad_(False)
        if self.quantizer is not None:
            self.quantizer.requires_grad_(False)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer before the pixels."""
        return self.pixel_decoder.last_layer if self.pixel_decoder is not None else self.decoder.last_layer


def to_stage2(model: TiTok, vqgan: MaskGITVQGAN) -> TiTok:
    """A stage-1 TiTok with the codebook and decoder of the MaskGIT-VQGAN whose codes it learned to predict.

    Raises:
        ZooError: the model is not in stage 1, or the codebook has another size.
    """
    config = model.config
    if config.target != "proxy" or config.pixel_decoder is not None:
        raise ZooError("to_stage2 takes a stage-1 TiTok: target 'proxy' and no pixel_decoder")
    if vqgan.config.quantizer.size != config.proxy_codes:
        raise ZooError(
            f"TiTok predicts {config.proxy_codes} proxy codes, this MaskGIT-VQGAN has {vqgan.config.quantizer.size}"
        )
    tuned = TiTok(replace(config, pixel_decoder=vqgan.config.stack))
    state = model.state_dict()
    state |= {f"pixel_decoder.{name}": value for name, value in vqgan.decoder.state_dict().items()}
    state["pixel_codebook.weight"] = vqgan.quantizer.embedding.weight.detach()
    tuned.load_state_dict(state)
    return tuned
