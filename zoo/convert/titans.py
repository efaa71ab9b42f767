"""Neural memory of titans-pytorch (unofficial; the paper's authors published none) <-> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row, load_strict, rows_to_official, rows_to_ours
from zoo.convert.common import check_round_trip, given_prefill, linear
from zoo.convert.parity import Case
from zoo.errors import ConfigError
from zoo.nn.layout import CAUSAL
from zoo.nn.memory import NeuralMemory, NeuralMemoryConfig

WHAT = "neural memory weights"


def table(config: NeuralMemoryConfig) -> list[Row]:
    """Every entry that is used, in official order; the memory network's own parameters are a template that is not."""
    rows = [Row("retrieve_norm.weight", "retrieve_norm.weight"), Row("store_norm.weight", "store_norm.weight")]
    if config.qk_norm:
        rows += [Row("q_norm.gamma", "q_norm"), Row("k_norm.gamma", "k_norm")]
    if config.heads > 1:
        rows += linear("combine_heads", "out_proj", False) + linear("retrieve_gate.0", "gate", False)
    rows += [Row(f"memory_model_parameters.{i}", f"memory.{i}") for i in range(config.depth + 1)]
    for theirs, ours in (("to_queries", "q_proj"), ("to_keys", "k_proj"), ("to_values", "v_proj")):
        rows += linear(theirs, ours, False)
    for theirs, ours in (("to_adaptive_step", "step_size"), ("to_momentum", "momentum"), ("to_decay_factor", "decay")):
        rows += linear(f"{theirs}.0", ours)
    return rows


def template_names(config: NeuralMemoryConfig) -> list[str]:
    """Names of the template's entries, in the order of memory_model_parameters."""
    return ["memory_model.norm.gamma", *[f"memory_model.model.weights.{i}" for i in range(config.depth)]]


def to_zoo(state: Mapping[str, Tensor], config: NeuralMemoryConfig) -> dict[str, Tensor]:
    """Official state dict -> ours. The template's values are left out: its forward pass is always given others.

    Raises:
        ZooError: a missing or unknown key.
    """
    unused = set(template_names(config))
    return rows_to_ours(table(config), {key: value for key, value in state.items() if key not in unused}, WHAT)


def to_official(state: Mapping[str, Tensor], config: NeuralMemoryConfig) -> dict[str, Tensor]:
    """Ours -> official state dict; the template gets the first head's values, whose storage it shares when new."""
    official = rows_to_official(table(config), state, WHAT)
    for i, name in enumerate(template_names(config)):
        official[name] = official[f"memory_model_parameters.{i}"][0]
    return official


def config_from_official(official: Mapping[str, Any]) -> NeuralMemoryConfig:
    """Arguments of NeuralMemory -> ours.

    Raises:
        ConfigError: one of the many experimental arguments away from its default.
    """
    get = official.get
    known = {"dim", "chunk_size", "batch_size", "dim_head", "heads", "momentum_order", "qk_rmsnorm",
             "default_step_transform_max_lr", "default_model_kwargs", "class"}  # fmt: skip
    defaults = {"momentum": True, "pre_rmsnorm": True, "per_head_learned_parameters": True, "num_kv_per_token": 1}
    for key, value in official.items():
        if key not in known and value not in (defaults.get(key), None, False):
            raise ConfigError(f"NeuralMemory with {key}={value!r} is not offered here")
    chunk = get("chunk_size", 1)
    if not isinstance(chunk, int) or (get("batch_size") or 0) % chunk:
        raise ConfigError("NeuralMemory is offered with one chunk_size for storing and reading, dividing batch_size")
    model = dict(get("default_model_kwargs") or {"depth": 2, "expansion_factor": 4.0})
    return NeuralMemoryConfig(
        heads=int(get("heads", 1)), head_dim=get("dim_head"), chunk=chunk, depth=int(model.get("depth", 2)),
        expansion=float(model.get("expansion_factor", 2.0)), momentum_order=int(get("momentum_order", 1)),
        qk_norm=bool(get("qk_rmsnorm", False)), max_lr=float(get("default_step_transform_max_lr", 1.0)),
        refresh=(get("batch_size") or 0) // chunk,
    )  # fmt: skip


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of NeuralMemory: at once, and in two parts with the state carried."""
    config = config_from_official(case.config)
    layer = NeuralMemory(int(case.config["dim"]), config).eval()
    load_strict(layer, to_zoo(case.state, config), WHAT)
    used = {key: value for key, value in case.state.items() if key not in template_names(config)}
    back = to_official(layer.state_dict(), config)
    check_round_trip({key: back[key] for key in used}, used, WHAT)
    x = case.inputs["x"]
    y, _ = layer(x, CAUSAL)
    first = given_prefill(case, 12)
    state = layer.init_state(*x.shape[:2])
    start, state = layer(x[:, :first], CAUSAL, state)
    end, state = layer(x[:, first:], CAUSAL, state)
    out = {"y": y, "y_split": torch.cat([start, end], 1)}
    # the official state's `weights` are those that surprises are taken at, not the ones it reads
    base = state.base or layer.begin(len(x), x.device, x.dtype).weights
    for name, value in zip(template_names(config), base, strict=True):
        out[f"final_weights.{name.removeprefix('memory_model.')}"] = value.flatten(0, 1)
    return out
