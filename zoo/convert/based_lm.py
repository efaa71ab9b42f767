"""BASED's language models (GPTLMHeadModel) and its sliding-window attention: official weights and configs <-> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.config import from_dict
from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.based import baseconv_rows, taylor_rows
from zoo.convert.common import block_streams, gradients, linear, load, next_token_loss
from zoo.convert.parity import Case
from zoo.models.lm import LM, LMConfig
from zoo.nn.attention import Attention, AttentionConfig
from zoo.nn.backbone import LayerSpec
from zoo.nn.baseconv import BaseConvConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import CAUSAL
from zoo.nn.mlp import MLPConfig

WHAT = "BASED weights"
MODEL = "lm"  # the family of zoo.models these weights become


def swap_halves(t: Tensor) -> Tensor:
    """The official gated MLP puts the gate second, ours first. Its own inverse."""
    first, second = t.chunk(2)
    return torch.cat([second, first])


def window_rows(official: str, ours: str, config: AttentionConfig) -> list[Row]:
    """Sliding-window attention."""
    rows = linear(official + "Wqkv", ours + "qkv", config.bias)
    return rows + linear(official + "out_proj", ours + "out_proj", config.out_bias)


def table(config: LMConfig) -> list[Row]:
    """Every official entry of a language model, in official order."""
    rows = [Row("transformer.embeddings.word_embeddings.weight", "embed.weight")]
    for i, spec in enumerate(config.layers):
        theirs, ours = f"transformer.layers.{i}.", f"backbone.layers.{i}."
        if spec.mixer == "based":
            rows += taylor_rows(theirs + "mixer.", ours + "mixer.")
        elif spec.mixer == "attention":
            rows += window_rows(theirs + "mixer.", ours + "mixer.", from_dict(AttentionConfig, spec.options))
        else:
            rows += baseconv_rows(theirs + "mixer.", ours + "mixer.", from_dict(BaseConvConfig, spec.options))
        rows += [
            Row(theirs + "norm1.weight", ours + "norm1.weight"),
            Row(theirs + "mlp.fc1.weight", ours + "mlp.gate_up.weight", swap_halves, swap_halves),
            Row(theirs + "mlp.fc2.weight", ours + "mlp.down.weight"),
            Row(theirs + "norm2.weight", ours + "norm2.weight"),
        ]
    rows.append(Row("transformer.ln_f.weight", "backbone.norm.weight"))
    return [*rows, Row("lm_head.weight", "embed.weight", first=False)]


def to_zoo(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Official state dict -> ours; a leading `model.` is dropped, as are metrics, as the official loader does.

    Raises:
        ZooError: a missing or unknown key.
    """
    state = {key.removeprefix("model."): tensor for key, tensor in state.items() if "metrics" not in key}
    return rows_to_ours(table(config), state, WHAT)


def recognises(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are weights of BASED's GPTLMHeadModel."""
    return any(key.endswith(".mixer.conv.conv.weight") for key in state) and any(".proj_q." in key for key in state)


def to_official(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Ours -> official state dict."""
    return rows_to_official(table(config), state, WHAT)


def config_from_official(official: Mapping[str, Any]) -> LMConfig:
    """The reference models' settings -> ours: `alt` layers are linear attention, `alt2` windows, the rest BaseConv.

    Also read: expand_proj, kernel_sizes, baseconv_use_bias, other_biases, pad_vocab_size_multiple, n_inner.
    """
    get = official.get
    width, heads, biases = int(official["n_embd"]), int(official["n_head"]), bool(get("other_biases", False))
    inner = int(get("n_inner") or 2 * width)
    # flash-attn's gated MLP rounds its width up to a multiple of 256
    mlp = MLPConfig(kind="swiglu", width=-(-inner // 256) * 256, bias=False)
    window = {
        "heads": heads, "bias": biases, "out_bias": biases, "window": int(get("win", 256)) // 2,
        "rope": {"dim": int(float(get("rotary_emb_fraction", 1)) * width // heads)},
    }  # fmt: skip
    conv = {
        "kernel": int(get("kernel_sizes", 3)), "expand": int(get("expand_proj", 4)),
        "bias": bool(get("baseconv_use_bias", True)),
    }  # fmt: skip
    linear_options = {"num_heads": heads, "feature_dim": int(get("feat", 16))}
    specs = {
        "alt": LayerSpec(mixer="based", options=linear_options, mlp=mlp),
        "alt2": LayerSpec(mixer="attention", options=window, mlp=mlp),
        "rest": LayerSpec(mixer="baseconv", options=conv, mlp=mlp),
    }
    kinds = ["rest"] * int(official["n_layer"])
    for name in ("alt", "alt2"):
        for i in get(name) or ():
            kinds[i] = name
    return LMConfig(
        d_model=width, vocab_size=int(get("vocab", 50257)), layers=tuple(specs[kind] for kind in kinds),
        vocab_multiple=int(get("pad_vocab_size_multiple", 8)), norm="rmsnorm", eps=1e-5, residual_in_fp32=True,
        head=HeadConfig(tied=True),
    )  # fmt: skip


@torch.no_grad()
def replay_lm(case: Case) -> dict[str, Tensor]:
    """Run a case of GPTLMHeadModel: for each layer what its MLP puts out, and the residual before that is added."""
    config = config_from_official({**case.run, **case.config})
    model = load(LM(config), table(config), case.state, WHAT)
    ids = case.inputs["input_ids"]
    with block_streams(model) as seen:
        logits = model(ids)
    out = {"logits": logits, "loss": next_token_loss(logits, ids), "embeddings": seen["embeddings"]}
    for i in range(len(config.layers)):
        out |= {f"layer{i}_hidden": seen[f"mlp{i}"], f"layer{i}_residual": seen[f"residual{i}"]}
    return out


def window_config(official: Mapping[str, Any]) -> AttentionConfig:
    """Arguments of SlidingAttention -> ours: a query sees window_size // 2 keys before its own."""
    turned = int(official.get("rotary_emb_dim", 0))
    options: dict[str, Any] = {
        "heads": int(official["num_heads"]), "kv_heads": int(official.get("num_heads_kv") or 0),
        "bias": bool(official.get("qkv_proj_bias", True)), "out_bias": bool(official.get("out_proj_bias", True)),
        "window": int(official.get("window_size", 128)) // 2, "scale": official.get("softmax_scale"),
    }  # fmt: skip
    if turned:
        options["rope"] = {
            "dim": turned, "base": float(official.get("rotary_emb_base", 10000.0)),
            "interleaved": bool(official.get("rotary_emb_interleaved", False)),
        }  # fmt: skip
    return from_dict(AttentionConfig, options)


def replay_window(case: Case) -> dict[str, Tensor]:
    """Run a case of SlidingAttention."""
    config = window_config(case.config)
    rows = window_rows("", "", config)
    layer = load(Attention(int(case.config["embed_dim"]), config), rows, case.state, WHAT)
    x = case.inputs["x"].clone().requires_grad_()
    y, _ = layer(x, CAUSAL)
    loss = y.square().mean()
    loss.backward()
    return {"y": y, "loss": loss, "grad_x": x.grad, **gradients(layer, rows, WHAT)}
