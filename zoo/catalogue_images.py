"""Published image models: rows of the catalogue, kept apart because there are many and their configs are nested.

Read by `zoo.catalogue`, which makes an `Entry` of each row. `context` is the number of tokens of a picture, `vocab`
the size of the codebook, 0 where the latents are continuous.
"""

from __future__ import annotations

from typing import Any

# the transformer sizes of TiTok
_B = {"width": 768, "layers": 12, "heads": 12, "mlp": {"kind": "gelu", "width": 3072}}
_L = {"width": 1024, "layers": 24, "heads": 16, "mlp": {"kind": "gelu", "width": 4096}}
# its first three releases: normalised codes, proxy codes and the decoder of MaskGIT-VQGAN, latents read unpermuted
_LEGACY = {
    "quantizer": {"size": 4096, "dim": 12, "l2_norm": True},
    "target": "proxy",
    "pixel_decoder": {"bias": False, "down": "avg_pool", "out_kernel": 1, "shortcut": "output"},
    "legacy_reshape": True,
}
_VAE = {"bottleneck": "vae", "quantizer": {"dim": 16}}


def _rar(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        "vit": {
            "width": width, "layers": layers, "heads": 16, "mlp": {"kind": "gelu", "width": inner}, "qk_norm": "affine",
            "eps": 1e-6, "qk_eps": 1e-6, "adaln": True, "dropout": 0.1, "attn_dropout": 0.1,
        }
    }  # fmt: skip


def _flextok_vit(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        "width": width, "layers": layers, "heads": width // 64,
        "mlp": {"kind": "swiglu", "width": inner, "bias": False},
        "qkv_bias": "none", "out_bias": False, "qk_norm": "plain", "scale": 0.125, "norm_affine": False,
    }  # fmt: skip


def _vae_stack(channels: int) -> dict[str, Any]:
    widths = [128, 256, 512, 512]
    return {"stack": {"widths": widths, "decoder_blocks": 3, "z_channels": channels, "mid_attention": True}}


def _flextok(encoder: tuple[int, int, int] | None, decoder: tuple[int, int, int] | None) -> dict[str, Any]:
    config: dict[str, Any] = {"vae": _vae_stack(16), "fsq": {"truncate_ids": True}}
    if encoder is not None:
        config["encoder"] = _flextok_vit(*encoder)
    if decoder is not None:
        config["decoder"] = {**_flextok_vit(*decoder), "adaln": True, "adaln_groups": 2}
    return config


def _row(
    model: str,
    hub: str,
    config: dict[str, Any],
    params: int,
    context: int,
    vocab: int,
    licence: str,
    task: str,
    file: str = "",
) -> dict[str, Any]:
    return {
        "model": model, "hub": hub, "config": config, "params": params, "context": context, "vocab": vocab,
        "tokenizer": "", "licence": licence, "tasks": (task,), "file": file,
    }  # fmt: skip


_APACHE, _APPLE = "apache-2.0", "apple-amlr"  # FlexTok's weights are for research only

IMAGE_ENTRIES: dict[str, dict[str, Any]] = {
    "titok-l32": _row(
        "titok",
        "yucornetto/tokenizer_titok_l32_imagenet",
        {"encoder": _L, "decoder": _L, "latents": 32, **_LEGACY},
        641054735,
        32,
        4096,
        _APACHE,
        "reconstruct",
    ),
    "titok-b64": _row(
        "titok",
        "yucornetto/tokenizer_titok_b64_imagenet",
        {"encoder": _B, "decoder": _B, "latents": 64, **_LEGACY},
        204814095,
        64,
        4096,
        _APACHE,
        "reconstruct",
    ),
    "titok-s128": _row(
        "titok", "yucornetto/tokenizer_titok_s128_imagenet", {**_LEGACY}, 83674639, 128, 4096, _APACHE, "reconstruct"
    ),
    "titok-bl64-vq8k": _row(
        "titok",
        "yucornetto/tokenizer_titok_bl64_vq8k_imagenet",
        {"encoder": _B, "decoder": _L, "latents": 64},
        390016148,
        64,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "titok-bl128-vq8k": _row(
        "titok",
        "yucornetto/tokenizer_titok_bl128_vq8k_imagenet",
        {"encoder": _B, "decoder": _L},
        390179988,
        128,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "titok-sl256-vq8k": _row(
        "titok",
        "yucornetto/tokenizer_titok_sl256_vq8k_imagenet",
        {"decoder": _L, "latents": 256},
        330260884,
        256,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "titok-ll32-vae-c16": _row(
        "titok",
        "yucornetto/tokenizer_titok_ll32_vae_c16_imagenet",
        {"encoder": _L, "decoder": _L, "latents": 32, **_VAE},
        606879604,
        32,
        0,
        _APACHE,
        "reconstruct",
    ),
    "titok-bl64-vae-c16": _row(
        "titok",
        "yucornetto/tokenizer_titok_bl64_vae_c16_imagenet",
        {"encoder": _B, "decoder": _L, "latents": 64, **_VAE},
        389418100,
        64,
        0,
        _APACHE,
        "reconstruct",
    ),
    "titok-bl128-vae-c16": _row(
        "titok",
        "yucornetto/tokenizer_titok_bl128_vae_c16_imagenet",
        {"encoder": _B, "decoder": _L, **_VAE},
        389581940,
        128,
        0,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-bl32-vq": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_bl32_vq",
        {"encoder": _B, "decoder": _L, "latents": 32, "text_length": 77},
        390800532,
        32,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-bl64-vq": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_bl64_vq",
        {"encoder": _B, "decoder": _L, "latents": 64, "text_length": 77},
        390882452,
        64,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-bl128-vq": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_bl128_vq",
        {"encoder": _B, "decoder": _L, "text_length": 77},
        391046292,
        128,
        8192,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-bl32-vae": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_bl32_vae",
        {"encoder": _B, "decoder": _L, "latents": 32, "text_length": 77, **_VAE},
        390202484,
        32,
        0,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-bl64-vae": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_bl64_vae",
        {"encoder": _B, "decoder": _L, "latents": 64, "text_length": 77, **_VAE},
        390284404,
        64,
        0,
        _APACHE,
        "reconstruct",
    ),
    "tatitok-sl128-vae": _row(
        "titok",
        "turkeyju/tokenizer_tatitok_sl128_vae",
        {"decoder": _L, "text_length": 77, **_VAE},
        330275188,
        128,
        0,
        _APACHE,
        "reconstruct",
    ),
    "maskgit-vqgan-f16": _row(
        "maskgit_vqgan",
        "fun-research/TiTok",
        {},
        54515587,
        256,
        1024,
        _APACHE,
        "reconstruct",
        "maskgit-vqgan-imagenet-f16-256.bin",
    ),
    "titok-l32-generator": _row(
        "maskgit", "yucornetto/generator_titok_l32_imagenet", {}, 177202432, 32, 4096, _APACHE, "generate_images"
    ),
    "titok-b64-generator": _row(
        "maskgit",
        "yucornetto/generator_titok_b64_imagenet",
        {"length": 64},
        177227008,
        64,
        4096,
        _APACHE,
        "generate_images",
    ),
    "titok-s128-generator": _row(
        "maskgit",
        "yucornetto/generator_titok_s128_imagenet",
        {
            "kind": "uvit",
            "length": 128,
            "vit": {
                "width": 1024,
                "layers": 20,
                "heads": 16,
                "mlp": {"kind": "gelu", "width": 4096},
                "qkv_bias": "none",
                "dropout": 0.1,
                "attn_dropout": 0.1,
            },
        },
        294990848,
        128,
        4096,
        _APACHE,
        "generate_images",
    ),
    "rar-b": _row("rar", "yucornetto/RAR", {}, 260923648, 256, 1024, _APACHE, "generate_images", "rar_b.bin"),
    "rar-l": _row(
        "rar", "yucornetto/RAR", _rar(1024, 24, 4096), 461668352, 256, 1024, _APACHE, "generate_images", "rar_l.bin"
    ),
    "rar-xl": _row(
        "rar", "yucornetto/RAR", _rar(1280, 32, 5120), 955425024, 256, 1024, _APACHE, "generate_images", "rar_xl.bin"
    ),
    "rar-xxl": _row(
        "rar", "yucornetto/RAR", _rar(1408, 40, 6144), 1498520704, 256, 1024, _APACHE, "generate_images", "rar_xxl.bin"
    ),
    "flextok-d12-d12-in1k": _row(
        "flextok", "EPFL-VILAB/flextok_d12_d12_in1k", _flextok(None, None), 341258521, 256, 64000, _APPLE, "reconstruct"
    ),
    "flextok-d18-d18-in1k": _row(
        "flextok",
        "EPFL-VILAB/flextok_d18_d18_in1k",
        _flextok((1152, 18, 3072), (1152, 18, 3072)),
        949144729,
        256,
        64000,
        _APPLE,
        "reconstruct",
    ),
    "flextok-d18-d28-in1k": _row(
        "flextok",
        "EPFL-VILAB/flextok_d18_d28_in1k",
        _flextok((1152, 18, 3072), (1792, 28, 4778)),
        2540129177,
        256,
        64000,
        _APPLE,
        "reconstruct",
    ),
    "flextok-d18-d28-dfn": _row(
        "flextok",
        "EPFL-VILAB/flextok_d18_d28_dfn",
        _flextok((1152, 18, 3072), (1792, 28, 4778)),
        2540129177,
        256,
        64000,
        _APPLE,
        "reconstruct",
    ),
    "flextok-vae-c4": _row(
        "flextok_vae", "EPFL-VILAB/flextok_vae_c4", _vae_stack(4), 83653863, 1024, 0, _APPLE, "reconstruct"
    ),
    "flextok-vae-c8": _row(
        "flextok_vae", "EPFL-VILAB/flextok_vae_c8", _vae_stack(8), 83709419, 1024, 0, _APPLE, "reconstruct"
    ),
    "flextok-vae-c16": _row(
        "flextok_vae", "EPFL-VILAB/flextok_vae_c16", _vae_stack(16), 83821011, 1024, 0, _APPLE, "reconstruct"
    ),
    "seed-2": _row(
        "seed", "AILab-CVC/seed-tokenizer-2", {}, 1149998528, 32, 8192, _APACHE, "reconstruct", "seed_quantizer.pt"
    ),
}
