"""Mamba-2 language models in the Hugging Face layout (Mamba2ForCausalLM) <-> ours, and the SSD function's cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import from_dict
from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.common import linear, load, next_token_loss
from zoo.convert.parity import Capture, Case
from zoo.errors import ConfigError
from zoo.models.lm import LM, LMConfig
from zoo.nn.backbone import Block
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import CAUSAL
from zoo.nn.mamba2 import Mamba2Config
from zoo.nn.ssd import ssd

WHAT = "Mamba-2 weights"
MODEL = "lm"  # the family of zoo.models these weights become


def mixer_rows(official: str, ours: str, config: Mamba2Config) -> list[Row]:
    """The table of one mixer under the name prefixes *official* and *ours*, in official order."""
    rows = [
        Row(official + "dt_bias", ours + "dt_bias"),
        Row(official + "A_log", ours + "a_log"),
        Row(official + "D", ours + "skip"),
        Row(official + "conv1d.weight", ours + "conv_weight"),
    ]
    if config.conv_bias:
        rows.append(Row(official + "conv1d.bias", ours + "conv_bias"))
    rows += linear(official + "in_proj", ours + "in_proj", config.bias)
    rows.append(Row(official + "norm.weight", ours + "norm_weight"))
    return rows + linear(official + "out_proj", ours + "out_proj", config.bias)


def table(config: LMConfig) -> list[Row]:
    """Every official entry of a model, in official order."""
    rows = [Row("backbone.embeddings.weight", "embed.weight")]
    mixer = from_dict(Mamba2Config, config.options)
    for i in range(config.n_layer):
        layer = f"backbone.layers.{i}."
        rows.append(Row(layer + "norm.weight", layer + "norm1.weight"))
        rows += mixer_rows(layer + "mixer.", layer + "mixer.", mixer)
    rows.append(Row("backbone.norm_f.weight", "backbone.norm.weight"))
    tied = config.head.tied
    return [*rows, Row("lm_head.weight", "embed.weight" if tied else "head.weight", first=not tied)]


def to_zoo(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Official state dict -> ours.

    Raises:
        ZooError: a missing or unknown key.
    """
    return rows_to_ours(table(config), state, WHAT)


def recognises(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are weights of Mamba2ForCausalLM."""
    return "backbone.embeddings.weight" in state and any(key.endswith(".mixer.A_log") for key in state)


def to_official(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Ours -> official state dict."""
    return rows_to_official(table(config), state, WHAT)


def config_from_official(official: Mapping[str, Any]) -> LMConfig:
    """A Hugging Face Mamba2Config as a dict -> ours.

    Raises:
        ConfigError: sizes that contradict each other, or an activation other than SiLU.
    """
    get = official.get
    width, expand, head_dim = int(get("hidden_size", 4096)), int(get("expand", 2)), int(get("head_dim", 64))
    if expand * width != head_dim * int(get("num_heads", expand * width // head_dim)):
        raise ConfigError("this Mamba-2 config has num_heads x head_dim different from expand x hidden_size")
    if get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"Mamba-2 with hidden_act={get('hidden_act')!r} is not offered here (only 'silu')")
    eps = float(get("layer_norm_epsilon", 1e-5))
    low, high = (float(v) for v in get("time_step_limit", (0.0, float("inf"))))
    options = {
        "d_state": int(get("state_size", 128)), "expand": expand, "head_dim": head_dim,
        "n_groups": int(get("n_groups", 8)), "conv_kernel": int(get("conv_kernel", 4)),
        "chunk": int(get("chunk_size", 256)), "bias": bool(get("use_bias", False)),
        "conv_bias": bool(get("use_conv_bias", True)), "dt_min": float(get("time_step_min", 1e-3)),
        "dt_max": float(get("time_step_max", 0.1)), "dt_floor": float(get("time_step_floor", 1e-4)),
        "dt_limit": None if low <= 0 and high == float("inf") else [low, min(high, 1e30)], "eps": eps,
    }  # fmt: skip
    return LMConfig(
        d_model=width, vocab_size=int(get("vocab_size", 32768)), n_layer=int(get("num_hidden_layers", 64)),
        mixer="mamba2", options=options, eps=eps, residual_in_fp32=bool(get("residual_in_fp32", True)),
        head=HeadConfig(tied=bool(get("tie_word_embeddings", False))),
    )  # fmt: skip


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a language-model case; `hidden<i>` is what layer i puts out, the last one the final norm."""
    config = config_from_official(case.config)
    model = load(LM(config), table(config), case.state, WHAT)
    ids = case.inputs["input_ids"]
    stages: dict[str, nn.Module] = {}
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, Block)
        stages |= {f"hidden{i}": layer, f"mixer{i}_out": layer.mixer, f"mixer{i}_in": layer.norm1}
    stages[f"hidden{config.n_layer}"] = model.backbone.norm
    with Capture(stages) as seen:
        logits = model(ids)
    out = seen.all()
    prefill = min(17, ids.shape[1])  # any split must give the same numbers
    hidden, state = model.forward_features(ids[:, :prefill], CAUSAL, model.init_state(len(ids), ids.shape[1]))
    parts = [hidden]
    for t in range(prefill, ids.shape[1]):
        hidden, state = model.forward_features(ids[:, t : t + 1], CAUSAL, state)
        parts.append(hidden)
    stepped = model.forward_head(torch.cat(parts, 1))
    return {**out, "logits": logits, "loss": next_token_loss(logits, ids), "logits_prefill_step": stepped}


def replay_ssd(case: Case) -> dict[str, Tensor]:
    """Run a case of the SSD function alone; A is negative, B and C stand for every head."""
    x, dt, a, b, c = (case.inputs[name] for name in ("x", "dt", "A", "B", "C"))
    x = x.clone().requires_grad_()
    y, state = ssd(x, dt, a, b, c, case.inputs.get("initial_states"), int(case.config.get("block_len", 64)))
    loss = y.square().mean()
    loss.backward()
    assert x.grad is not None
    return {"y": y, "final_state": state, "loss": loss, "grad_x": x.grad}
