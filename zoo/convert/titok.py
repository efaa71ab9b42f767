"""TiTok and TA-TiTok (bytedance/1d-tokenizer) <-> ours."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.convert.maskgit_vqgan import decoder_pairs, stack_from_state
from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers
from zoo.models.maskgit_vqgan import maskgit_stack
from zoo.models.titok import TiTok, TiTokConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.vae_bottleneck import DiagonalGaussian
from zoo.nn.vit import ViTConfig
from zoo.nn.vq import VectorQuantizerConfig

# width, layers, heads; the tiny ones occur in parity cases only
_SIZES = {
    "small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16), "tiny": (64, 2, 4), "tiny96": (96, 3, 6),
}  # fmt: skip
_PIXEL_DECODER = {"channel_mult": [1, 1, 2, 2, 4], "hidden_channels": 128, "num_res_blocks": 2, "z_channels": 256}

_BLOCK = [
    ("ln_1.*", "norm1.*"),
    ("ln_2.*", "norm2.*"),
    ("attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj.*", "attn.out_proj.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
]
_SIDE = [
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("latent_token_positional_embedding", "latent_pos"),
    ("ln_pre.*", "norm_in.*"),
    ("ln_post.*", "norm_out.*"),
    *below("transformer.{}.", "transformer.blocks.{}.", _BLOCK),
]


def _renames(config: TiTokConfig) -> Renames:
    pixel = decoder_pairs(len(config.pixel_decoder.widths)) if config.pixel_decoder is not None else []
    head = [("ffn.0.*", "head.0.*"), ("ffn.2.*", "head.2.*")] if config.target == "proxy" else [("ffn.0.*", "head.*")]
    return Renames(
        [
            ("latent_tokens", "encoder.latent_tokens"),
            *below("encoder.", "encoder.", [*_SIDE, ("patch_embed.*", "patch_embed.*"), ("conv_out.*", "proj_out.*")]),
            *below("decoder.", "decoder.", [*_SIDE, *head, ("conv_out.*", "conv_out.*"), ("mask_token", "mask_token")]),
            ("decoder.decoder_embed.*", "decoder.latent_embed.*"),
            ("decoder.text_guidance_proj.*", "decoder.text_proj.*"),
            ("decoder.text_guidance_positional_embedding", "decoder.text_pos"),
            ("quantize.*", "quantizer.*"),
            ("pixel_quantize.embedding.weight", "pixel_codebook.weight"),
            *below("pixel_decoder.", "pixel_decoder.", pixel),
        ]
    )


def _vit(size: str) -> ViTConfig:
    width, layers, heads = _SIZES[size]
    return ViTConfig(width=width, layers=layers, heads=heads, mlp=MLPConfig(kind="gelu", width=4 * width))


def config_from_official(official: dict[str, Any]) -> TiTokConfig:
    """From the `config` of config.json, or of the YAML files in configs/infer."""
    vq = official["model"]["vq_model"]
    legacy = vq.get("is_legacy", True)
    name = official.get("experiment", {}).get("tokenizer_checkpoint", "")
    text = "text_context_length" in vq or official.get("class") == "TATiTok" or "tatitok" in name
    pixel = None
    if vq.get("finetune_decoder", True):
        p = _PIXEL_DECODER | vq.get("pixel_decoder", {})
        pixel = maskgit_stack(p["hidden_channels"], tuple(p["channel_mult"]), p["num_res_blocks"], p["z_channels"])
    vae = vq.get("quantize_mode", "vq") == "vae"
    return TiTokConfig(
        encoder=_vit(vq["vit_enc_model_size"]),
        decoder=_vit(vq["vit_dec_model_size"]),
        encoder_patch=vq["vit_enc_patch_size"],
        decoder_patch=vq["vit_dec_patch_size"],
        latents=vq["num_latent_tokens"],
        bottleneck="vae" if vae else "vq",
        quantizer=VectorQuantizerConfig(
            size=vq.get("codebook_size", 1024),
            dim=vq["token_size"],
            l2_norm=vq.get("use_l2_norm", False),
            commitment=vq.get("commitment_cost", 0.25),
            update="cvq" if vq.get("clustering_vq") else "gradient",
        ),
        target="proxy" if legacy else "pixels",
        pixel_decoder=pixel,
        legacy_reshape=legacy,
        text_length=vq.get("text_context_length", 77) if text else 0,
        text_width=vq.get("text_embed_dim", 768),
        preprocess=PreprocessConfig(size=official["dataset"]["preprocessing"]["crop_size"]),
    )


def tatitok_config_from_official(official: dict[str, Any]) -> TiTokConfig:
    """The same for TA-TiTok, whose configs name their class only by the checkpoint's file name."""
    return config_from_official({**official, "class": "TATiTok"})


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a TiTok or TA-TiTok."""
    return "latent_tokens" in state and "encoder.latent_token_positional_embedding" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "vq_model" in config.get("model", {}) and "dataset" in config


def config_from_state(state: State) -> TiTokConfig:
    """The config as far as shapes tell it, for the `.bin` files that come without one.

    Heads are 64 wide, and codes are normalised exactly in the legacy form, as in every released model.
    """
    proxy = "decoder.ffn.2.weight" in state
    patch = state["encoder.patch_embed.weight"].shape[-1]
    size = patch * math.isqrt(len(state["encoder.positional_embedding"]) - 1)
    dim = state["decoder.decoder_embed.weight"].shape[1]
    vae = "quantize.embedding.weight" not in state
    text = state.get("decoder.text_guidance_positional_embedding")
    return TiTokConfig(
        encoder=_vit_of(state, "encoder."),
        decoder=_vit_of(state, "decoder."),
        encoder_patch=patch,
        decoder_patch=size // math.isqrt(len(state["decoder.positional_embedding"]) - 1),
        latents=len(state["latent_tokens"]),
        bottleneck="vae" if vae else "vq",
        quantizer=VectorQuantizerConfig(
            size=1024 if vae else len(state["quantize.embedding.weight"]), dim=dim, l2_norm=proxy,
            update="cvq" if "quantize.embed_prob" in state else "gradient",
        ),
        target="proxy" if proxy else "pixels",
        proxy_codes=len(state["decoder.ffn.2.weight"]) if proxy else 1024,
        pixel_decoder=stack_from_state(state, "pixel_decoder.") if "pixel_decoder.conv_in.weight" in state else None,
        legacy_reshape=proxy,
        text_length=0 if text is None else len(text),
        text_width=768 if text is None else state["decoder.text_guidance_proj.weight"].shape[1],
        preprocess=PreprocessConfig(size=size),
    )  # fmt: skip


def _vit_of(state: State, side: str) -> ViTConfig:
    width = state[side + "class_embedding"].shape[1]
    inner = len(state[side + "transformer.0.mlp.c_fc.weight"])
    return ViTConfig(
        width=width,
        layers=count_layers(state, side + "transformer."),
        heads=width // 64,
        mlp=MLPConfig(kind="gelu", width=inner),
    )


def to_zoo(state: State, config: TiTokConfig) -> dict[str, Tensor]:
    """Official state dict -> ours; 1x1 convolutions become linear layers and the mask token loses an axis."""
    out = _renames(config).to_zoo(state)
    for name in _linears(out):
        out[name] = out[name].flatten(1)
    out["decoder.mask_token"] = out["decoder.mask_token"].flatten(0, 1)
    return out


def to_official(state: State, config: TiTokConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    for name in _linears(out):
        out[name] = out[name][..., None, None]
    out["decoder.mask_token"] = out["decoder.mask_token"][None]
    return _renames(config).to_official(out)


def _linears(state: State) -> list[str]:
    return [n for n in state if n.startswith(("encoder.proj_out.", "decoder.head.")) and n.endswith("weight")]


def _build(case: Case) -> TiTok:
    make = tatitok_config_from_official if case.system == "tatitok" else config_from_official
    config = make(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = TiTok(config).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Encode, quantize and decode one batch with every stage; serves TiTok and TA-TiTok, VQ and VAE."""
    model = _build(case)
    encoder, decoder = model.encoder, model.decoder
    stages = {
        "enc.patch_embed": encoder.patch_embed, "enc.ln_pre": encoder.norm_in, "enc.ln_post": encoder.norm_out,
        "dec.decoder_embed": decoder.latent_embed, "dec.ln_pre": decoder.norm_in, "dec.ln_post": decoder.norm_out,
    }  # fmt: skip
    stages |= {f"enc.block{i}": block for i, block in enumerate(encoder.transformer.blocks)}
    stages |= {f"dec.block{i}": block for i, block in enumerate(decoder.transformer.blocks)}
    if model.config.text_length:
        stages["dec.text_guidance_proj"] = decoder.text_proj
    text = case.inputs.get("text_guidance")
    with Capture({**stages, "head": decoder.head, "z": encoder}) as seen:
        out = _bottleneck(model, case)
        latents = out.pop("latents")
        out["decoded"] = model.decode_latents(latents, text)
        logits = model.proxy_logits(latents, text)
    out |= seen.all()
    out["dec.ffn"] = decoder.to_grid(out.pop("head"))
    out["z"], out["z_quantized"] = _columns(out["z"]), _columns(latents)
    if model.config.target == "proxy":
        out["dec.proxy_logits"] = logits
    if model.pixel_decoder is not None:
        out["pixel.soft_quant"] = model.mix_proxies(logits)
    if "proxy_codes" in case.inputs:
        loss = F.cross_entropy(logits.flatten(2), case.inputs["proxy_codes"])
        weight = case.config.get("losses", {}).get("quantizer_weight", 1.0)
        out["stage1.reconstruction_loss"] = loss
        out["stage1.total_loss"] = loss + weight * out["quantizer_loss"]
    return out


def _bottleneck(model: TiTok, case: Case) -> dict[str, Tensor]:
    z = model.encoder(case.inputs["pixel_values"])
    if model.quantizer is not None:
        result = model.quantizer(z)
        return {"latents": result.codes, "tokens": result.ids[:, None], "quantizer_loss": result.loss, **result.parts}
    posterior = DiagonalGaussian(z, dim=-1)
    latents = posterior.mode()
    for name, value in case.inputs.items():  # a stored draw of the noise, if the case sampled
        if name not in ("pixel_values", "text_guidance") and value.shape == _columns(latents).shape:
            latents = latents + posterior.std * value[:, :, 0].transpose(1, 2)
    moments = {name: _columns(getattr(posterior, name)) for name in ("mean", "logvar", "std")}
    return {"latents": latents, "kl": posterior.kl((-1,)), **moments}


def _columns(x: Tensor) -> Tensor:
    """[B, K, C] -> [B, C, 1, K], the official layout."""
    return x.transpose(1, 2)[:, :, None]
