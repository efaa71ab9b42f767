"""Published video models: rows of the catalogue, read by `zoo.catalogue`, which makes an `Entry` of each.

`context` is the number of tokens of a clip of 17 frames of 128 x 128 pixels, or the longest input of a transformer.
"""

from __future__ import annotations

from typing import Any

_LARGE = {
    "d_model": 3072, "n_layer": 32, "options": {"heads": 32, "bias": True, "out_bias": True},
    "mlp": {"kind": "gelu", "width": 12288},
}  # fmt: skip
_UCF = {"cond_vocab": 32000, "cond_tokens": 8, "hybrid": True}


def _nbp(hub: str, file: str, config: dict[str, Any], params: int) -> dict[str, Any]:
    return {
        "model": "nbp", "hub": hub, "config": config, "params": params, "context": 5120, "vocab": 64000,
        "tokenizer": "", "licence": "mit", "tasks": ("generate_video",), "file": file,
    }  # fmt: skip


def _other(
    model: str, hub: str, file: str, config: dict[str, Any], params: int, vocab: int, licence: str
) -> dict[str, Any]:
    return {
        "model": model, "hub": hub, "config": config, "params": params, "context": 1280, "vocab": vocab,
        "tokenizer": "", "licence": licence, "tasks": ("reconstruct_video",), "file": file,
    }  # fmt: skip


def _tokenizer(hub: str, file: str) -> dict[str, Any]:
    return {
        "model": "nbp_tokenizer", "hub": hub, "config": {}, "params": 370372105, "context": 1280, "vocab": 64000,
        "tokenizer": "", "licence": "mit", "tasks": ("reconstruct_video",), "file": file,
    }  # fmt: skip


VIDEO_ENTRIES: dict[str, dict[str, Any]] = {
    "nbp-ucf-base": _nbp("ShuhuaiRen/NBP-ucf-base", "ucf_base_nbp16_hybrid.ckpt", _UCF, 982785024),
    "nbp-ucf-3b": _nbp("ShuhuaiRen/NBP-ucf-3b", "ucf_3b_nbp16_hybrid.ckpt", {**_LARGE, **_UCF}, 4230813696),
    "nbp-k600-base": _nbp("ShuhuaiRen/NBP-k600-base", "k600_base_nbp16.ckpt", {}, 884431872),
    "nbp-k600-3b": _nbp("ShuhuaiRen/NBP-k600-3b", "k600_3b_nbp16.ckpt", _LARGE, 4034107392),
    "nbp-tokenizer-ucf": _tokenizer("ShuhuaiRen/NBP-tokenizer-ucf", "magvit2_ucf.pt"),
    "nbp-tokenizer-k600": _tokenizer("ShuhuaiRen/NBP-tokenizer-k600", "magvit2_k600.pt"),
    "omnitokenizer-k600": _other(
        "omnitokenizer", "Daniel0724/OmniTokenizer", "imagenet_k600.ckpt", {}, 53773976, 8192, "mit"
    ),
    "omnitokenizer-k600-vae": _other(
        "omnitokenizer", "Daniel0724/OmniTokenizer", "imagenet_k600_vae.ckpt", {"vae": True}, 53778080, 0, "mit"
    ),
    "open-magvit2-video": _other(
        "open_magvit2",
        "TencentARC/Open-MAGVIT2-Tokenizer-262144-Video",
        "video_128_262144.ckpt",
        {},
        370547349,
        262144,
        "apache-2.0",
    ),
}
