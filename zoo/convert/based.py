"""BASED (HazyResearch/based) and JRT (HazyResearch/prefix-linear-attention): official layers and models <-> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row
from zoo.convert.common import given_prefill, linear, load
from zoo.convert.parity import Case
from zoo.nn.baseconv import BaseConv, BaseConvConfig
from zoo.nn.based import JRT, Based, BasedConfig, JRTConfig, taylor_features
from zoo.nn.layout import CAUSAL, Layout

WHAT = "BASED weights"


def taylor_rows(official: str, ours: str, prefix: bool = False) -> list[Row]:
    """Linear attention, or with *prefix* JRT's."""
    names = ["proj_q", "proj_k", "proj_v", *(("proj_k_enc", "proj_v_enc") if prefix else ()), "out_proj"]
    mine = {"out_proj": "out_proj", **{n: n.removeprefix("proj_") + "_proj" for n in names if n != "out_proj"}}
    return [row for name in names for row in linear(official + name, ours + mine[name], False)]


def baseconv_rows(official: str, ours: str, config: BaseConvConfig) -> list[Row]:
    """The gated short convolution."""
    rows = linear(official + "in_proj", ours + "in_proj", config.bias)
    rows += linear(official + "out_proj", ours + "out_proj", config.bias)
    rows.append(Row(official + "conv.conv.weight", ours + "conv_weight"))
    if config.conv_bias:
        rows.append(Row(official + "conv.conv.bias", ours + "conv_bias"))
    return rows


def taylor_config(official: Mapping[str, Any]) -> BasedConfig:
    """Arguments of LinearAttention -> ours."""
    return BasedConfig(
        num_heads=int(official.get("num_heads", 16)), feature_dim=int(official.get("feature_dim", 16)),
        head_dim=official.get("head_dim"), eps=float(official.get("eps", 1e-12)),
    )  # fmt: skip


def jrt_config(official: Mapping[str, Any]) -> JRTConfig:
    """Arguments of PrefixLinearAttention -> ours."""
    return JRTConfig(
        num_heads=int(official["num_heads"]), feature_dim=int(official.get("feature_dim", 16)),
        scale_dim=official.get("scale_dim"), eps=float(official.get("eps", 1e-12)),
        enc_length=int(official["enc_length"]),
    )  # fmt: skip


def baseconv_config(official: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> BaseConvConfig:
    """Arguments of BaseConv -> ours; the convolution has a bias in its CUDA form only, which *state* tells."""
    return BaseConvConfig(
        kernel=int(official.get("kernel_size", 3)), expand=int(official.get("expand_proj", 2)),
        bias=bool(official.get("use_bias", True)), conv_bias="conv.conv.bias" in (state or {}),
    )  # fmt: skip


def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of LinearAttention, SlidingAttention, BaseConv or GPTLMHeadModel."""
    name = case.class_name
    if "LinearAttention" in name:
        return _replay_taylor(case)
    if "BaseConv" in name:
        return _replay_baseconv(case)
    from zoo.convert.based_lm import replay_lm, replay_window

    return replay_window(case) if "SlidingAttention" in name else replay_lm(case)


def _full(features: Tensor, d: int) -> Tensor:
    """Triangular features on the last axis -> the official map's full outer product."""
    i, j = torch.triu_indices(d, d)
    square = features.new_zeros(*features.shape[:-1], d, d)
    values = features[..., 1 + d :] * torch.where(i == j, 1.0, 0.5**0.5)
    square[..., i, j] = values
    square[..., j, i] = values
    return torch.cat([features[..., : 1 + d], square.flatten(-2)], dim=-1)


def _states(sums: Tensor, d: int, name: str) -> dict[str, Tensor]:
    full = _full(sums.transpose(-1, -2), d)[:, :, None]  # [B, H, 1, dv + 1, F]
    return {f"{name}_kv_state": full[..., :-1, :], f"{name}_k_state": full[..., -1:, :]}


def _replay_taylor(case: Case) -> dict[str, Tensor]:
    config = taylor_config(case.config)
    layer = load(Based(int(case.config["d_model"]), config), taylor_rows("", ""), case.state, WHAT)
    x = case.inputs["x"].clone().requires_grad_()
    y, _ = layer(x, CAUSAL)
    loss = y.square().mean()
    loss.backward()
    d, (batch, length, _) = config.feature_dim, x.shape
    with torch.no_grad():
        q = layer._heads(layer.q_proj(x))
        out = {"y": y, "loss": loss, "grad_x": x.grad, "phi_q": _full(taylor_features(q, layer.scale), d)}
        prefill = given_prefill(case, 20)
        state: Any = layer.init_state(batch, length)
        part, state = layer(x[:, :prefill], CAUSAL, state)
        out |= _states(state.sums, d, "prefill")
        parts = [part]
        for t in range(prefill, length):
            y, state = layer.step(x[:, t], state)
            parts.append(y[:, None])
        return {**out, **_states(state.sums, d, "final"), "y_prefill_step": torch.cat(parts, 1)}


@torch.no_grad()
def _replay_baseconv(case: Case) -> dict[str, Tensor]:
    config = baseconv_config(case.config, case.state)
    layer = load(BaseConv(int(case.config["d_model"]), config), baseconv_rows("", "", config), case.state, WHAT)
    x = case.inputs["x"]
    state: Any = layer.init_state(x.shape[0], x.shape[1])
    steps = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    return {"y": layer(x, CAUSAL)[0], "y_prefill_step": torch.stack(steps, 1)}


def replay_jrt(case: Case) -> dict[str, Tensor]:
    """Run a case of PrefixLinearAttention: x whole, x then x_gen token by token, and both at once."""
    config = jrt_config(case.config)
    layer = load(JRT(int(case.config["embed_dim"]), config), taylor_rows("", "", True), case.state, "JRT weights")
    x, more = case.inputs["x"].clone().requires_grad_(), case.inputs["x_gen"]
    layout, d = Layout("prefix", prefix=config.enc_length), config.feature_dim
    y, _ = layer(x, layout)
    loss = y.square().mean()
    loss.backward()
    with torch.no_grad():
        state: Any = layer.init_state(len(x), x.shape[1] + more.shape[1])
        part, state = layer(x, layout, state)
        out = {"y": y, "loss": loss, "grad_x": x.grad, **_states(state.sums, d, "prefill")}
        parts = [part]
        for t in range(more.shape[1]):
            y, state = layer.step(more[:, t], state)
            parts.append(y[:, None])
        whole, _ = layer(torch.cat([x, more], 1), layout)
    return {**out, **_states(state.sums, d, "final"), "y_prefill_step": torch.cat(parts, 1), "y_full": whole}
