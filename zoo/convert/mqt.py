"""MQT-LLaVA and LLaVA-1.5 (official key layout) <-> ours, the abstractor alone, and the replay of MQT's cases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.convert import llama, load_strict
from zoo.convert.parity import Case
from zoo.convert.rename import Renames, State, below, check_round_trip, fuse, split
from zoo.models.decoder import DecoderConfig
from zoo.models.mqt import MQT, MQTConfig, next_token_loss
from zoo.nn.clip import VisionTowerConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.query_transformer import QueryTransformer, QueryTransformerConfig, resize_positions, sincos_2d
from zoo.nn.vit import ViTConfig

ABSTRACTOR, TOWER = "model.query_abstractor.", "model.vision_tower.vision_tower.vision_model."
QUERIES = [
    ("pos_embed", "pos_embed"),
    ("query", "query"),
    ("proj", "proj"),
    ("attn.in_proj_weight", "qkv.weight"),
    ("attn.in_proj_bias", "qkv.bias"),
    ("attn.out_proj.*", "out_proj.*"),
    ("ln_{}.*", "norm_{}.*"),
]
CLIP = [
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.patch_embedding.weight", "patch_embed.weight"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("pre_layrnorm.*", "norm_in.*"),  # the official spelling
    *below(
        "encoder.layers.{}.",
        "transformer.blocks.{}.",
        [
            ("self_attn.out_proj.*", "attn.out_proj.*"),
            ("self_attn.{}_proj.*", "attn.{}_proj.*"),
            ("layer_norm1.*", "norm1.*"),
            ("layer_norm2.*", "norm2.*"),
            ("mlp.*", "mlp.*"),
        ],
    ),
    ("post_layernorm.*", "norm_out.*"),
]
RENAMES = Renames(
    [
        *below(TOWER, "tower.", CLIP),
        *below(ABSTRACTOR, "projector.", QUERIES),
        ("model.mm_projector.*", "projector.*"),
    ]
)
EYES = Renames(below("vision_model.", "", CLIP))
ALONE = Renames(below(ABSTRACTOR, "", QUERIES))
PROJECTOR = Renames([("model.mm_projector.*", "*")])


def recognises(state: State, config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are the weights of a whole MQT-LLaVA or LLaVA-1.5."""
    projector = "model.mm_projector.0.weight" in state or f"{ABSTRACTOR}query" in state
    return projector and "model.embed_tokens.weight" in state


def abstractor_to_zoo(state: State) -> dict[str, Tensor]:
    """`query_abstractor.bin` of stage 1 -> the state of a `QueryTransformer`."""
    return ALONE.to_zoo({ABSTRACTOR + key.split("query_abstractor.")[-1]: value for key, value in state.items()})


def abstractor_to_official(state: State) -> dict[str, Tensor]:
    """The inverse of `abstractor_to_zoo`."""
    return ALONE.to_official(state)


def projector_to_zoo(state: State) -> dict[str, Tensor]:
    """LLaVA-1.5's `mm_projector.bin` -> the state of an `mlp` projector."""
    return PROJECTOR.to_zoo(state)


def projector_to_official(state: State) -> dict[str, Tensor]:
    """The inverse of `projector_to_zoo`."""
    return PROJECTOR.to_official(state)


def clip_to_zoo(state: State, config: VisionTowerConfig) -> dict[str, Tensor]:
    """The `vision_model.` of a CLIP in transformers' layout -> the state of a `VisionTower`."""
    out = EYES.to_zoo({key: value for key, value in state.items() if not key.endswith(".position_ids")})
    for i in range(config.vit.layers):
        for leaf in ("weight", "bias"):
            fuse(out, _parts(i, leaf, ""), f"transformer.blocks.{i}.attn.qkv.{leaf}")
    return out


def to_zoo(state: State, config: MQTConfig) -> dict[str, Tensor]:
    """Official state dict (vision tower included) -> ours."""
    eyes = {k: v for k, v in state.items() if k.startswith((TOWER, ABSTRACTOR, "model.mm_projector."))}
    out = RENAMES.to_zoo(eyes)
    for i in range(config.tower.vit.layers):
        for leaf in ("weight", "bias"):
            fuse(out, _parts(i, leaf), f"tower.transformer.blocks.{i}.attn.qkv.{leaf}")
    text = llama.to_zoo({k: v for k, v in state.items() if k not in eyes}, config.lm, "mqt")
    return out | {f"lm.{key}": value for key, value in text.items()}


def to_official(state: State, config: MQTConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    eyes = {k: v for k, v in state.items() if not k.startswith("lm.")}
    for i in range(config.tower.vit.layers):
        for leaf in ("weight", "bias"):
            split(eyes, f"tower.transformer.blocks.{i}.attn.qkv.{leaf}", _parts(i, leaf))
    if config.projector == "mlp":  # otherwise both kinds of projector would answer to one prefix
        names = Renames([*below(TOWER, "tower.", CLIP), ("model.mm_projector.*", "projector.*")])
    else:
        names = RENAMES
    text = {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")}
    return llama.to_official(text, config.lm, "hf", "mqt") | names.to_official(eyes)


def _parts(layer: int, leaf: str, prefix: str = "tower.") -> list[str]:
    return [f"{prefix}transformer.blocks.{layer}.attn.{name}_proj.{leaf}" for name in "qkv"]


def queries_from_official(official: Mapping[str, Any]) -> QueryTransformerConfig:
    """From the arguments of the official Resampler."""
    rows, columns = official.get("tgt_size") or (24, 24)
    width = int(official.get("kv_dim") or official["embed_dim"])
    return QueryTransformerConfig(
        grid=int(official["grid_size"]),
        width=width,
        out_width=int(official["embed_dim"]),
        heads=int(official["num_heads"]),
        source=(int(rows), int(columns)),
    )


def config_from_official(official: Mapping[str, Any]) -> MQTConfig:
    """From the sections `llm` and `clip` (transformers' Llama and CLIP vision configs) and the `mm_` fields.

    The query transformer's M and heads are fixed in the official code: 256 and one for every 64 features.
    """
    clip: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
    clip |= official.get("clip") or {}
    width, side = int(clip["hidden_size"]), int(clip["image_size"]) // int(clip["patch_size"])
    act = str(clip["hidden_act"])
    lm = DecoderConfig(**llama.config_fields(official.get("llm") or official, "mqt"))
    return MQTConfig(
        tower=VisionTowerConfig(
            vit=ViTConfig(
                width=width,
                layers=int(clip["num_hidden_layers"]),
                heads=int(clip["num_attention_heads"]),
                mlp=MLPConfig(kind=act, width=int(clip["intermediate_size"])),  # type: ignore[arg-type]
                eps=float(clip["layer_norm_eps"]),
            ),
            size=int(clip["image_size"]),
            patch=int(clip["patch_size"]),
            layer=int(official.get("mm_vision_select_layer", -2)),
        ),
        projector="mlp" if "mm_projector_type" in official else "queries",
        queries=QueryTransformerConfig(
            grid=round(int(official.get("num_visual_tokens_max", 256)) ** 0.5),
            width=width,
            out_width=lm.d_model,
            heads=max(width // 64, 1),
            source=(side, side),
        ),
        lm=lm,
        image_token=int(official.get("image_token_index", -200)),
    )


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case: position tables, the query transformer alone, or the whole model."""
    if "llm" in case.config:
        return _replay_model(case)
    if case.state:
        return _replay_queries(case)
    return _replay_tables(case)


def _replay_tables(case: Case) -> dict[str, Tensor]:
    """`pos_embed_*_by_<n>` and `key_pos_*_by_<n>`: every n-th column of the tables; `key_row_sum`: rows' sums."""
    size = case.config["tgt_size"]
    table = sincos_2d(int(case.config["embed_dim"]), int(case.config["grid_size"])).half()
    keys = resize_positions(table, (int(size[0]), int(size[1]))).float()
    out = {"key_row_sum": keys.sum(1)}
    for name in case.outputs:
        if step := re.fullmatch(r"(pos_embed|key_pos)_.*by_(\d+)", name):
            out[name] = (table.float() if step[1] == "pos_embed" else keys)[:, :: int(step[2])]
    return out


def _replay_queries(case: Case) -> dict[str, Tensor]:
    """`tokens_m<m>` and, in the official axis order, the `stage_m<m>.*` of a call."""
    config = queries_from_official(case.config)
    model = QueryTransformer(config).eval()
    load_strict(model, abstractor_to_zoo(case.state), case.path.name)
    official = {key.removeprefix(ABSTRACTOR): v for key, v in abstractor_to_official(model.state_dict()).items()}
    check_round_trip(case.state, official)
    features = case.inputs["image_features"]
    out: dict[str, Tensor] = {}
    for m in {int(found[1]) for name in case.outputs if (found := re.match(r"(?:tokens|stage)_m(\d+)", name))}:
        keys = model.keys(features)
        weights = model.attention(m, keys)
        out |= {
            f"tokens_m{m}": model(features, m),
            f"stage_m{m}.pos_embed_keys": resize_positions(model.pos_embed, config.source),
            f"stage_m{m}.ln_q": model.queries(m)[:, None].expand(-1, len(features), -1),
            f"stage_m{m}.ln_k": keys.transpose(0, 1),
            f"stage_m{m}.ln_v": model.norm_v(features).transpose(0, 1),
            f"stage_m{m}.attn_weights": weights.expand(len(features), -1, -1, -1),
            f"stage_m{m}.attn_out": model.attend(features, m),
        }
    return out


def _replay_model(case: Case) -> dict[str, Tensor]:
    """`m<m>.*` of the whole model, the tower's features, and greedy decoding of the first row."""
    config = config_from_official(case.config)
    # the case's own normalisation of its pictures, and transformers' outputs at padding
    tower = dataclasses.replace(config.tower, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    config = dataclasses.replace(config, tower=tower, lm=dataclasses.replace(config.lm, padding="eager"))
    model = MQT(config).eval()
    load_strict(model, to_zoo(case.state, config), case.path.name)
    check_round_trip(case.state, to_official(model.state_dict(), config))
    blocks = case.inputs["pixel_u8"].float() / 255
    pixels = F.interpolate(blocks, size=(config.tower.size, config.tower.size), mode="nearest")
    ids, valid, labels = (case.inputs[name] for name in ("input_ids", "attention_mask", "labels"))
    features = model.tower(pixels)
    out = {"clip_features_cols_by_32": features[:, ::16, ::32]}
    assert isinstance(model.projector, QueryTransformer)
    for m in {int(found[1]) for name in case.outputs if (found := re.match(r"m(\d+)\.", name))}:
        tokens = model.projector(features, m)
        spliced = model.splice(ids, tokens, valid.bool(), labels)
        logits = model.read(spliced)
        assert spliced.labels is not None
        out |= {
            f"m{m}.visual_tokens": tokens,
            f"m{m}.inputs_embeds": spliced.embeds,
            f"m{m}.attention_mask": spliced.valid,
            f"m{m}.labels": spliced.labels,
            f"m{m}.logits": logits,
            f"m{m}.loss": next_token_loss(logits, spliced.labels),
        }
    if "generate_ids" in case.outputs:
        # transformers starts what it generates from embeddings with the bos id
        new = case.outputs["generate_ids"].shape[1] - 1
        text = ids[0][valid[0].bool()]
        images = int((text == config.image_token).sum())
        answer = model.answer(text, pixels[:images], int(case.config["generate_m"]), new)
        out["generate_ids"] = torch.cat([answer.new_tensor([1]), answer])[None]
    return out
