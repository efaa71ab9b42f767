"""SEED's tokenizer and its stage-1 model (AILab-CVC/SEED) <-> ours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers, fuse, split
from zoo.models.seed import (
    SEED,
    SEEDConfig,
    SEEDContrastive,
    SEEDContrastiveConfig,
    contrastive_loss,
    decoder_vit,
    eva_vit,
    stage2_losses,
)
from zoo.nn.preprocess import CLIP_MEAN, CLIP_STD, PreprocessConfig
from zoo.nn.qformer import QFormerConfig
from zoo.nn.vq import VectorQuantizerConfig

_PARTS = ("query", "key", "value")
_LAYER = [
    ("attention.output.dense.*", "attn.out_proj.*"),
    ("attention.output.LayerNorm.*", "norm1.*"),
    ("attention.self.{}.*", "attn.{}.*"),
    ("crossattention.output.dense.*", "cross.out_proj.*"),
    ("crossattention.output.LayerNorm.*", "norm_cross.*"),
    ("crossattention.self.query.*", "cross.q.*"),
    ("crossattention.self.{}.*", "cross.{}.*"),
    ("intermediate_query.dense.*", "mlp.fc1.*"),
    ("output_query.dense.*", "mlp.fc2.*"),
    ("output_query.LayerNorm.*", "norm2.*"),
    ("intermediate.dense.*", "text_mlp.fc1.*"),
    ("output.dense.*", "text_mlp.fc2.*"),
    ("output.LayerNorm.*", "text_norm.*"),
]
_QFORMER = [
    ("bert.embeddings.LayerNorm.*", "norm_in.*"),
    ("bert.embeddings.word_embeddings.weight", "word_embed.weight"),
    ("bert.embeddings.position_embeddings.weight", "text_pos"),
    *below("bert.encoder.layer.{}.", "layers.{}.", _LAYER),
]
_BLOCK = [("attn.proj.*", "attn.out_proj.*"), ("*", "*")]
RENAMES = Renames(
    [
        ("query_tokens", "qformer.queries"),
        ("reverse_tokens", "reverse_qformer.queries"),
        ("pos_embed", "pos_embed"),
        ("pos_embed_image", "pos_embed_image"),
        ("visual_encoder.cls_token", "vit.cls_token"),
        ("visual_encoder.pos_embed", "vit.pos_embed"),
        ("visual_encoder.patch_embed.proj.*", "vit.patch_embed.*"),
        *below("visual_encoder.blocks.{}.", "vit.transformer.blocks.{}.", _BLOCK),
        ("ln_vision.*", "norm_vision.*"),
        *below("Qformer.", "qformer.", _QFORMER),
        *below("Reverse_Qformer.", "reverse_qformer.", _QFORMER),
        ("quantize.embedding.weight", "quantizer.embedding.weight"),
        ("encode_task_layer.*", "to_codes.*"),
        ("decode_task_layer.*", "from_codes.*"),
        *below("blocks.{}.", "blocks.blocks.{}.", _BLOCK),
        *below("blocks_image.{}.", "blocks_image.blocks.{}.", _BLOCK),
        ("image_down.*", "image_down.*"),
        ("distill_image_proj.*", "image_head.*"),
        ("temp", "temperature"),
        ("text_proj.*", "text_proj.*"),
        ("vision_proj.*", "vision_proj.*"),
    ]
)
_FLAT = ("qformer.queries", "reverse_qformer.queries", "pos_embed", "pos_embed_image", "vit.cls_token", "vit.pos_embed")
_POSITION_IDS = ".bert.embeddings.position_ids"  # a counter in the official files; ours needs none


def _qformer(bert: dict[str, Any], queries: int, width: int, every: int = 2, text: bool = False) -> QFormerConfig:
    return QFormerConfig(
        width=bert["hidden_size"], encoder_width=width, layers=bert["num_hidden_layers"], cross_every=every,
        heads=bert["num_attention_heads"], inner=bert["intermediate_size"], queries=queries,
        causal=queries == 32,  # the official mask is causal for exactly 32 queries
        text_vocab=bert["vocab_size"] if text else 0, text_length=bert["max_position_embeddings"],
        dropout=bert.get("hidden_dropout_prob", 0.1), attn_dropout=bert.get("attention_probs_dropout_prob", 0.1),
    )  # fmt: skip


def config_from_official(official: dict[str, Any]) -> SEEDConfig:
    """From the constructor arguments of Blip2QformerQuantizer, with its vit and bert configs spelt out."""
    vit, bert = official["vit"], official["bert"]
    preprocess = PreprocessConfig(size=vit["img_size"], resize="both", kernel="bicubic", mean=CLIP_MEAN, std=CLIP_STD)
    return SEEDConfig(
        vit=eva_vit(vit["embed_dim"], vit["depth"], vit["num_heads"], vit["mlp_ratio"]),
        patch=vit["patch_size"],
        qformer=_qformer(bert, official["num_query_token"], vit["embed_dim"], official.get("cross_attention_freq", 2)),
        quantizer=VectorQuantizerConfig(
            size=official["n_embed"], dim=official["codebook_embed_dim"], commitment=1.0, codebook=0.25
        ),
        decoder=decoder_vit(bert["hidden_size"], official["decode_depth"]),
        embedder="reverse_qformer" if official.get("use_qformer_image") else "image_down",
        embed_width=official["image_features_dim"],
        preprocess=preprocess,
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a SEED tokenizer."""
    return "encode_task_layer.0.weight" in state and "query_tokens" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "codebook_embed_dim" in config and "bert" in config


def config_from_state(state: State) -> SEEDConfig:
    """The config as the shapes of `seed_quantizer.pt` tell it; heads as released (EVA 16, Q-Former and decoder 12)."""
    width = state["visual_encoder.cls_token"].shape[-1]
    patch = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    grid = math.isqrt(state["visual_encoder.pos_embed"].shape[1] - 1)
    codes, dim = state["quantize.embedding.weight"].shape
    inner = state["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape
    vit = eva_vit(width, count_layers(state, "visual_encoder.blocks."), 16)
    mlp = replace(vit.mlp, width=len(state["visual_encoder.blocks.0.mlp.fc1.weight"]))
    bert = {
        "hidden_size": inner[1], "intermediate_size": inner[0], "num_attention_heads": 12,
        "num_hidden_layers": count_layers(state, "Qformer.bert.encoder.layer."),
        "max_position_embeddings": state["Qformer" + _POSITION_IDS].shape[1],
    }  # fmt: skip
    return SEEDConfig(
        vit=replace(vit, mlp=mlp),
        patch=patch,
        qformer=_qformer(bert, state["query_tokens"].shape[1], width),
        quantizer=VectorQuantizerConfig(size=codes, dim=dim, commitment=1.0, codebook=0.25),
        decoder=decoder_vit(inner[1], count_layers(state, "blocks.")),
        embedder="image_down" if "image_down.0.weight" in state else "reverse_qformer",
        embed_width=len(state["distill_image_proj.bias"]),
        preprocess=replace(SEEDConfig().preprocess, size=grid * patch),
    )


def contrastive_config_from_official(official: dict[str, Any], run: dict[str, Any]) -> SEEDContrastiveConfig:
    """From the arguments of the stage-1 class and the width of the encoder it reads."""
    qformer = _qformer(
        official["bert"],
        official["num_query_token"],
        run["encoder_width"],
        run.get("cross_attention_freq", 2),
        text=True,
    )
    return SEEDContrastiveConfig(qformer=qformer, embed_width=official["embed_dim"])


def to_zoo(state: State, config: SEEDConfig | SEEDContrastiveConfig) -> dict[str, Tensor]:
    """Official state dict -> ours: fused projections, no leading axes of one, no position counters."""
    out = RENAMES.to_zoo({name: value for name, value in state.items() if not name.endswith(_POSITION_IDS)})
    for name in _FLAT:
        if name in out:
            out[name] = out[name][0]
    for prefix in _prefixes(out, ".attn.query.weight"):
        for leaf in ("weight", "bias"):
            fuse(out, [f"{prefix}.attn.{part}.{leaf}" for part in _PARTS], f"{prefix}.attn.qkv.{leaf}")
    for prefix in _prefixes(out, ".cross.key.weight"):
        for leaf in ("weight", "bias"):
            fuse(out, [f"{prefix}.cross.{part}.{leaf}" for part in _PARTS[1:]], f"{prefix}.cross.kv.{leaf}")
    return out


def to_official(state: State, config: SEEDConfig | SEEDContrastiveConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    for prefix in _prefixes(out, ".cross.kv.weight"):
        for leaf in ("weight", "bias"):
            split(out, f"{prefix}.cross.kv.{leaf}", [f"{prefix}.cross.{part}.{leaf}" for part in _PARTS[1:]])
    for prefix in _prefixes(out, ".attn.qkv.weight"):
        if "qformer.layers" in prefix:
            for leaf in ("weight", "bias"):
                split(out, f"{prefix}.attn.qkv.{leaf}", [f"{prefix}.attn.{part}.{leaf}" for part in _PARTS])
    for name in _FLAT:
        if name in out:
            out[name] = out[name][None]
    official = RENAMES.to_official(out)
    counter = torch.arange(config.qformer.text_length)[None]
    for name in ("Qformer", "Reverse_Qformer"):
        if any(key.startswith(name + ".") for key in official):
            official[name + _POSITION_IDS] = counter.to(next(iter(official.values())).device)
    return official


def _prefixes(state: State, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in state if name.endswith(suffix)]


def _load(case: Case, model: SEED | SEEDContrastive) -> None:
    state = to_zoo(case.state, model.config)
    counters = {name: torch.arange(v.shape[1])[None] for name, v in case.state.items() if name.endswith(_POSITION_IDS)}
    check_round_trip(case.state | counters, to_official(state, model.config))
    model.load_state_dict(state)
    model.eval()


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """The tokenizer with either decode head, or the stage-1 contrastive model."""
    if "text_ids" in case.inputs:
        return _replay_contrastive(case)
    model = SEED(config_from_official(case.config))
    _load(case, model)
    stages: dict[str, Any] = {
        "vit.out": model.vit, "ln_vision": model.norm_vision, "patches": model.vit.patch_embed,
        "encode_task": model.to_codes, "decode_task": model.from_codes, "recon_s": model.blocks,
        "blocks_image_last": model.blocks_image, "qformer.embeddings": model.qformer.norm_in,
        "qformer.last_hidden": model.qformer,
    }  # fmt: skip
    stages |= {f"vit.block{i}": block for i, block in enumerate(model.vit.transformer.blocks)}
    stages |= {f"blocks_image{i}": block for i, block in enumerate(model.blocks_image.blocks)}
    if model.image_down is not None:
        stages["image_down"] = model.image_down
    if model.reverse_qformer is not None:
        stages["reverse_qformer.last_hidden"] = model.reverse_qformer
    for i, layer in enumerate(model.qformer.layers):
        stages |= {f"qformer.layer{i}": layer, f"qformer.layer{i}.self_attention": layer.norm1}
        if layer.norm_cross is not None:
            stages[f"qformer.layer{i}.cross_attention"] = layer.norm_cross
    with Capture(stages) as seen:
        states = model.features(case.inputs["image"])
        result = model.quantizer(model.to_codes(states))
        codes = model.quantizer.lookup(result.ids)
        decoded = model.from_codes(codes)
        rebuilt = model.blocks(decoded + model.pos_embed)
        embedding = model.image_embedding(decoded)
    out = seen.all()
    out["vit.patch_embed"] = out.pop("patches").flatten(2).transpose(1, 2)
    losses = stage2_losses(result.loss, rebuilt, states, embedding, case.inputs["clip_image_embeds"])
    return out | {
        "quant": codes,
        "tokens": result.ids,
        "image_embed": embedding,
        "quant_loss_legacy": result.loss,
        "loss_recon_s": losses["recon_loss"],
        "loss_distill_image": losses["distill_loss"],
        "loss_total": losses["total"],
    }


def _replay_contrastive(case: Case) -> dict[str, Tensor]:
    model = SEEDContrastive(contrastive_config_from_official(case.config, case.run))
    _load(case, model)
    states = model.qformer(case.inputs["image_embeds"])
    words = model.qformer.text(case.inputs["text_ids"], case.inputs["text_attention_mask"].bool())
    image, text = model.embed_image(states), model.embed_text(words)
    similarity = model.similarity(image, text)
    return {
        "query_output": states,
        "text_output": words,
        "image_feat_last_query": image,
        "text_feat": text,
        "sim_i2t": similarity,
        "sim_t2i": similarity.T,
        "loss_itc": contrastive_loss(similarity),
    }
