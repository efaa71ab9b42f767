"""Orchid (Karami-m/orchid): official operators <-> ours. Source: orchid_standalone.py OrchidOperator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.common import gradients, linear, load, squeeze
from zoo.convert.parity import Case
from zoo.errors import ConfigError
from zoo.nn.hyena import HyenaConfig, decay_rates
from zoo.nn.layout import FULL
from zoo.nn.orchid import Orchid, OrchidConfig
from zoo.nn.shortconv import causal_short_conv

WHAT = "Orchid weights"


def _filter_rows(official: str, ours: str, d_model: int, config: OrchidConfig) -> list[Row]:
    times = lambda: torch.linspace(0, 1, config.max_len)[None, :, None]
    rates = lambda: decay_rates(d_model, HyenaConfig())[None, None]
    network = official + "implicit_filter."
    rows = [
        Row(official + "bias", ours + "skip"),
        Row(official + "pos_emb.z", ours + "positions", *squeeze(0)),
        Row(official + "pos_emb.t", None, value=times),
    ]
    for j in range(config.num_inner_mlps + 1):
        rows += linear(f"{network}{2 * j}", f"{ours}layers.{j}")
        # one sine module stands at several places: one frequency under several names
        there, back = squeeze(0)
        rows.append(Row(f"{network}{2 * j + 1}.freq", ours + "freq", there, back, first=j == 0))
    rows.append(Row(f"{network}{2 * config.num_inner_mlps + 2}.weight", ours + "out.weight"))
    return [*rows, Row(official + "modulation.deltas", None, value=rates)]


def table(d_model: int, config: OrchidConfig) -> list[Row]:
    """Every official entry of an operator, in official order."""
    rows = linear("in_linear", "in_proj") + linear("out_linear", "out_proj")
    rows += linear("conv1d_short", "short_filter")
    rows += _filter_rows("fixed_conv.", "filter.", d_model, config)
    if config.residual:
        rows += _filter_rows("fixed_conv_res.", "residual.", d_model, config)
    names = {"k": "nn_model_k", "q": "nn_model_q", "time": "nn_model", "freq": "nn_model2"}
    if config.kernel == "corr":
        names["freq"] = "nn_model_frq"
    elif config.network == "convf":
        names["freq"] = "nn_model"
    layer = Orchid(d_model, config)
    for ours, theirs in names.items():
        if ours not in layer.nets:
            continue
        for i in range(config.conv_layers):
            rows += linear(f"conv_kernel_nn.{theirs}.conv1d_ls.{i}", f"nets.{ours}.convs.{i}", config.conv_bias)
        if config.conv_norm == "layernorm":
            for i in range(config.conv_layers):
                norm = f"conv_kernel_nn.{theirs}.norm_ls.{i}.norm_conv_kernel"
                rows += linear(norm, f"nets.{ours}.norms.{i}")
    return rows


def to_zoo(state: Mapping[str, Tensor], config: OrchidConfig) -> dict[str, Tensor]:
    """Official state dict -> ours.

    Raises:
        ZooError: a missing or unknown key, or a stored position grid that the config does not imply.
    """
    return rows_to_ours(table(state["out_linear.weight"].shape[0], config), state, WHAT)


def to_official(state: Mapping[str, Tensor], config: OrchidConfig) -> dict[str, Tensor]:
    """Ours -> official state dict."""
    return rows_to_official(table(state["out_proj.weight"].shape[0], config), state, WHAT)


def config_from_official(official: Mapping[str, Any]) -> OrchidConfig:
    """Arguments of OrchidOperator -> ours.

    Raises:
        ConfigError: orders other than 2 (for others the published shapes do not fit together), several heads, a
            chain, activation or norm that ours does not offer.
    """
    get, kernel = official.get, dict(official.get("conv_kernel") or {})
    fixed = {"order": 2, "num_heads": 1, "actchain": "id", "w_mod": 1, "normalized": False, "linear_mixer": False,
             "bidirectional": False, "modulate": True}  # fmt: skip
    for key, value in fixed.items():
        if get(key, value) != value:
            raise ConfigError(f"Orchid with {key}={get(key)!r} is not offered here (only {value!r})")
    if kernel.get("activation", "gelu") != "gelu" or kernel.get("norm", "layernorm") not in ("layernorm", "none"):
        raise ConfigError("Orchid's conditioning network is offered with GELU and with layernorm or no norm only")
    transform = str(get("dxt", "fft"))
    if transform.startswith("dct") and transform != "dct1":
        transform = "dct"  # `dct2`, and the dense and reduced forms `dctx*`, are one transform
    return OrchidConfig(
        max_len=int(get("l_max", 128)), transform=transform,  # type: ignore[arg-type]
        kernel=str(kernel.get("type", "absfreq")).replace("corrTime", "corr"),  # type: ignore[arg-type]
        network=str(kernel.get("nn", "convtf")).replace("conv2", "conv"),  # type: ignore[arg-type]
        conv_size=int(kernel.get("conv_filter_size", 3)), conv_layers=int(kernel.get("n_layer", 1)),
        conv_norm=kernel.get("norm", "layernorm"), conv_bias=bool(kernel.get("bias", True)),
        padding=kernel.get("padding_mode", "zeros"), actq=kernel.get("actq", "id"), cut=bool(get("causal", True)),
        residual=get("residual_long_conv", "sconv") == "sconv", short_filter=int(get("short_filter_order", 3)),
        filter_width=int(get("filter_order", 64)), emb_dim=int(get("emb_dim", 3)),
        num_inner_mlps=int(get("num_inner_mlps", 2)), sin_freq=float(get("w", 1)),
    )  # fmt: skip


def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of OrchidOperator."""
    config, width = config_from_official(case.config), int(case.config["d_model"])
    rows = table(width, config)
    layer = load(Orchid(width, config), rows, case.state, WHAT)
    x = case.inputs["x"].clone().requires_grad_()
    length = x.shape[1]
    y, _ = layer(x, FULL)
    loss = y.square().mean()
    loss.backward()
    out = {"y": y, "loss": loss, "grad_x": x.grad, **gradients(layer, rows, WHAT)}
    with torch.no_grad():
        u = layer.in_proj(x)
        adaptive = layer.adaptive(u[..., -width:])
        short = causal_short_conv(u, layer.short_filter.weight, layer.short_filter.bias)
        out |= {"short_conv": short.transpose(1, 2), "static_kernel": layer.filter(length)[None]}
        out |= {"adaptive_spec_re": adaptive.real, "adaptive_spec": adaptive}
        out["adaptive_spec_im"] = adaptive.imag if adaptive.is_complex() else torch.zeros_like(adaptive)
        _, first, v = short.transpose(1, 2).split(width, dim=1)
        out["adaptive_conv_0"] = layer.convolve(v * first, adaptive)
    return out
