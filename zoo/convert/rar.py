"""RAR (bytedance/1d-tokenizer) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers
from zoo.generate.autoregressive_image import generate_rar
from zoo.models.rar import RAR, RARConfig, rar_vit

RENAMES = Renames(
    [
        ("cls_token", "start_token"),
        ("pos_embed", "pos_embed"),
        ("target_aware_pos_embed", "target_pos_embed"),
        ("timesteps_embeddings", "step_embed"),
        ("embeddings.weight", "embed.weight"),
        ("lm_head.*", "head.*"),
        ("adaln_before_head.adaLN_modulation.1.*", "modulation.proj.*"),
        *below(
            "blocks.{}.",
            "transformer.blocks.{}.",
            [("attn.proj.*", "attn.out_proj.*"), ("adaLN_modulation.1.*", "modulation.proj.*"), ("*", "*")],
        ),
    ]
)
_TABLES = ("start_token", "pos_embed", "target_pos_embed", "step_embed")


def config_from_official(official: dict[str, Any]) -> RARConfig:
    """From the whole config (model.vq_model and model.generator)."""
    g = official["model"]["generator"]
    return RARConfig(
        codes=official["model"]["vq_model"]["codebook_size"],
        classes=g["condition_num_classes"],
        length=g["image_seq_len"],
        vit=rar_vit(
            g["hidden_size"],
            g["num_hidden_layers"],
            g["num_attention_heads"],
            g["intermediate_size"],
            g["dropout"],
            g["attn_drop"],
        ),
        class_dropout=g["class_label_dropout"],
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a RAR generator."""
    return "target_aware_pos_embed" in state and "timesteps_embeddings" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "generator" in config.get("model", {})


def config_from_state(state: State) -> RARConfig:
    """The config as the shapes of a `.bin` file tell it; dropout as published."""
    rows, width = state["embeddings.weight"].shape
    codes = len(state["lm_head.bias"])
    heads = width // len(state["blocks.0.attn.q_norm.weight"])
    vit = rar_vit(width, count_layers(state, "blocks."), heads, len(state["blocks.0.mlp.fc1.weight"]))
    return RARConfig(
        codes=codes, classes=rows - codes - 2, length=state["timesteps_embeddings"].shape[1] - 100, vit=vit
    )


def to_zoo(state: State, config: RARConfig) -> dict[str, Tensor]:
    """Official state dict -> ours; the last modulation holds (scale, shift) there and (shift, scale) here."""
    out = _swap(RENAMES.to_zoo(state))
    return out | {name: out[name][0] for name in _TABLES}


def to_official(state: State, config: RARConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = _swap(dict(state))
    return RENAMES.to_official(out | {name: out[name][None] for name in _TABLES})


def _swap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for leaf in ("weight", "bias"):
        name = f"modulation.proj.{leaf}"
        state[name] = torch.cat(state[name].chunk(2)[::-1])
    return state


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Teacher-forced logits in given and raster orders, with and without the cache, and greedy guided sampling."""
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = RAR(config).eval()
    model.load_state_dict(state)
    ids, classes, orders = case.inputs["ids"], case.inputs["class"], case.inputs["orders"]
    labels = ids.gather(1, orders)
    stages: dict[str, Any] = {f"block{i}": block for i, block in enumerate(model.transformer.blocks)}
    head_in: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _module, args: head_in.append(args[0]))
    with Capture(stages) as seen:
        logits = model(labels, classes, orders)
    handle.remove()
    out = seen.all() | {"logits_random_order": logits, "labels_random_order": labels, "adaln_before_head": head_in[0]}
    out["loss_random_order"] = model.loss(ids, classes, orders)
    out["logits_raster"] = model(ids, classes)
    caches = model.init_caches(len(ids))
    steps = [model(ids[:, :n], classes, caches=caches) for n in range(config.length)]
    out["kvcache_step_logits"] = torch.cat(steps, 1)
    run = case.run
    out["greedy_ids_cfg"] = generate_rar(
        model, classes, run["guidance_scale"], run["guidance_scale_pow"], temperature=0
    )
    return out
