"""TiTok's MaskGIT generators (bytedance/1d-tokenizer: ViT as a Hugging Face BERT, U-ViT) <-> ours."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers, fuse, split
from zoo.generate.maskgit import MaskGITSampling, masked_after, maskgit
from zoo.models.maskgit import MaskGIT, MaskGITConfig, mask_tokens, masked_loss
from zoo.nn.mlp import MLPConfig
from zoo.nn.vit import ViTConfig

_BERT = Renames(
    [
        ("model.embeddings.word_embeddings.weight", "embed.weight"),
        ("model.embeddings.position_embeddings.weight", "pos_embed"),
        ("model.embeddings.token_type_embeddings.weight", "type_embed"),
        ("model.embeddings.LayerNorm.*", "norm.*"),
        *below(
            "model.encoder.layer.{}.",
            "blocks.{}.",
            [
                ("attention.output.dense.*", "attn.out_proj.*"),
                ("attention.self.{}.*", "attn.{}.*"),
                ("attention.output.LayerNorm.*", "norm1.*"),
                ("intermediate.dense.*", "mlp.fc1.*"),
                ("output.dense.*", "mlp.fc2.*"),
                ("output.LayerNorm.*", "norm2.*"),
            ],
        ),
        ("model.lm_head.*", "head.*"),
    ]
)
_BERT_PARTS = ("query", "key", "value")


def _uvit(layers: int) -> Renames:
    half = layers // 2
    block = [("attn.proj.*", "attn.out_proj.*"), ("*", "*")]
    pairs = [
        ("embeddings.weight", "embed.weight"),
        ("pos_embed", "pos_embed"),
        ("norm.*", "norm.*"),
        ("lm_head.*", "head.*"),
    ]
    for i in range(half):
        pairs.append((f"out_blocks.{i}.skip_linear.*", f"skips.{i}.*"))
        pairs += below(f"in_blocks.{i}.", f"blocks.{i}.", block)
        pairs += below(f"out_blocks.{i}.", f"blocks.{half + 1 + i}.", block)
    return Renames([*pairs, *below("mid_block.", f"blocks.{half}.", block)])


def config_from_official(official: dict[str, Any]) -> MaskGITConfig:
    """From the whole config (model.vq_model, model.generator, losses).

    Raises:
        KeyError: a part is missing.
    """
    g, losses = official["model"]["generator"], official.get("losses", {})
    uvit = g["model_type"] == "UViT"
    return MaskGITConfig(
        kind="uvit" if uvit else "bert",
        codes=official["model"]["vq_model"]["codebook_size"],
        classes=g["condition_num_classes"],
        length=g["image_seq_len"],
        vit=ViTConfig(
            width=g["hidden_size"], layers=g["num_hidden_layers"], heads=g["num_attention_heads"],
            mlp=MLPConfig(kind="gelu", width=g["intermediate_size"]), qkv_bias="none" if uvit else "all",
            prenorm=uvit, eps=1e-5 if uvit else 1e-12, dropout=g["dropout"], attn_dropout=g["attn_drop"],
        ),
        class_dropout=g["class_label_dropout"],
        label_smoothing=losses.get("label_smoothing", 0.1),
        unmasked_weight=losses.get("loss_weight_unmasked_token", 0.1),
    )  # fmt: skip


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a TiTok generator."""
    return "model.lm_head.bias" in state or ("mid_block.attn.qkv.weight" in state and "lm_head.bias" in state)


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "generator" in config.get("model", {})


def config_from_state(state: State) -> MaskGITConfig:
    """The config as far as shapes tell it; 16 heads and dropout as in every released generator."""
    uvit = "mid_block.attn.qkv.weight" in state
    embed = state["embeddings.weight" if uvit else "model.embeddings.word_embeddings.weight"]
    inner = state["mid_block.mlp.fc1.weight" if uvit else "model.encoder.layer.0.intermediate.dense.weight"]
    codes = len(state["lm_head.bias" if uvit else "model.lm_head.bias"])
    positions = state["pos_embed"][0] if uvit else state["model.embeddings.position_embeddings.weight"]
    layers = 2 * count_layers(state, "in_blocks.") if uvit else count_layers(state, "model.encoder.layer.")
    vit = ViTConfig(
        width=embed.shape[1], layers=layers, heads=16, mlp=MLPConfig(kind="gelu", width=len(inner)),
        qkv_bias="none" if uvit else "all", prenorm=uvit, eps=1e-5 if uvit else 1e-12, dropout=0.1, attn_dropout=0.1,
    )  # fmt: skip
    classes, length = len(embed) - codes - 2, len(positions) - 1
    return MaskGITConfig(kind="uvit" if uvit else "bert", codes=codes, classes=classes, length=length, vit=vit)


def to_zoo(state: State, config: MaskGITConfig) -> dict[str, Tensor]:
    """Official state dict -> ours."""
    if config.kind == "uvit":
        out = _uvit(config.vit.layers).to_zoo(state)
        out["pos_embed"] = out["pos_embed"][0]
        return out
    out = _BERT.to_zoo(state)
    for i in range(config.vit.layers):
        for leaf in ("weight", "bias"):
            fuse(out, [f"blocks.{i}.attn.{part}.{leaf}" for part in _BERT_PARTS], f"blocks.{i}.attn.qkv.{leaf}")
    return out


def to_official(state: State, config: MaskGITConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    if config.kind == "uvit":
        out["pos_embed"] = out["pos_embed"][None]
        return _uvit(config.vit.layers).to_official(out)
    for i in range(config.vit.layers):
        for leaf in ("weight", "bias"):
            split(out, f"blocks.{i}.attn.qkv.{leaf}", [f"blocks.{i}.attn.{part}.{leaf}" for part in _BERT_PARTS])
    return _BERT.to_official(out)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Logits and stages, the training loss and masking, the mask schedule, and every generation that the case names."""
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = MaskGIT(config).eval()
    model.load_state_dict(state)
    inputs, classes = case.inputs, case.inputs["condition"]
    stages: dict[str, Any] = {"norm": model.norm, "embeddings": model.norm, "last_hidden": model.blocks[-1]}
    half = len(model.skips)
    if config.kind == "uvit":
        stages["mid_block"] = model.blocks[half]
        stages |= {f"in_block{i}": model.blocks[i] for i in range(half)}
        stages |= {f"out_block{i}": model.blocks[half + 1 + i] for i in range(half)}
    else:
        stages |= {f"block{i}": block for i, block in enumerate(model.blocks)}
    with Capture(stages) as seen:
        logits = model(inputs["masked_ids"], classes)
    out = seen.all() | {"logits_cond": logits}
    none = torch.full_like(classes, model.dropped)
    out["logits_uncond"] = model(inputs["masked_ids"], none)
    ids, mask = inputs["input_ids"], inputs["mask"]
    out["mlm_loss"], out["mlm_correct"] = masked_loss(logits, ids, mask, config.label_smoothing, config.unmasked_weight)
    out["mlm_loss_all_masked_weight"] = masked_loss(logits, ids, mask, config.label_smoothing, 1.0)[0]
    out["train_masked_ids"], out["train_mask"] = mask_tokens(
        ids, model.mask_id, inputs["train_timesteps"], inputs["train_perm_u"]
    )
    for name in case.outputs:
        if name.startswith("num_masked_after_step."):
            out[name] = _schedule(name)
        elif name.startswith("gen.") and name.endswith(".ids"):
            out |= _generate(model, case, name)
    return out


def _schedule(name: str) -> Tensor:
    found = re.fullmatch(r"num_masked_after_step\.seq(\d+)\.steps(\d+)", name)
    assert found is not None, name
    length, steps = int(found[1]), int(found[2])
    masked, counts = length, []
    for step in range(steps - 1):
        masked = masked_after(length, steps, step, masked)
        counts.append(masked)
    return torch.tensor([*counts, 0])


def _generate(model: MaskGIT, case: Case, name: str) -> dict[str, Tensor]:
    found = re.fullmatch(r"gen\.(?:gumbel\.)?([a-z-]+)\.scale([\d.]+?)(?:\.temp([\d.]+?))?\.anneal([01])\.ids", name)
    assert found is not None, name
    decay, scale, temperature, anneal = found.groups()
    sampling = MaskGITSampling(
        steps=case.run["num_sample_steps"],
        temperature=float(temperature or 0),
        guidance=float(scale),
        decay=decay,  # type: ignore[arg-type]
        power=case.run.get("guidance_scale_pow", 3.0),
        anneal=anneal == "1",
    )
    draws = {"conf": iter(case.inputs["gumbel_u_conf"]), "logits": iter(case.inputs["gumbel_u_logits"])}

    def draw(shape: torch.Size) -> Tensor:
        return torch.empty(0) if len(shape) == 1 else next(draws["conf" if len(shape) == 2 else "logits"])

    classes = case.inputs["condition"]
    none = torch.full_like(classes, model.dropped)
    before: list[Tensor] = []
    ids = maskgit(
        lambda x, unconditional: model(x, none if unconditional else classes),
        len(classes), model.config.length, model.mask_id, sampling, draw, before.append,
    )  # fmt: skip
    return {name: ids, f"{name}_before_step": torch.stack(before, 1)}
