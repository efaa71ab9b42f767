"""Replay of the parity cases of HyenaDNA and of safari's Hyena (operator and language model)."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert import Row, load_strict, rows_to_official, rows_to_ours
from zoo.convert import hyenadna as convert
from zoo.convert.parity import Capture, Case
from zoo.errors import ZooError
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn.hyena import Hyena
from zoo.nn.layout import CAUSAL
from zoo.nn.longconv import long_conv


def replay(case: Case) -> dict[str, Tensor]:
    """A HyenaDNA case: any of its official classes."""
    return _language_model(case)


def replay_hyena(case: Case) -> dict[str, Tensor]:
    """A case of safari: its standalone operator, or its language model."""
    return _language_model(case) if "n_layer" in case.config else _operator(case)


def _language_model(case: Case) -> dict[str, Tensor]:
    official = {"class": case.class_name, **case.config}
    config = convert.config_from_official(official)
    names = convert.names_of(case.state)
    state = _settle(case.state, convert.table(config, names))
    ours = convert.to_zoo(state, config)
    _same_state(convert.to_official(ours, config, names), state)
    model = HyenaDNA(config).eval()
    load_strict(model, ours, "the case's weights")
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        return _stages(model, config, ids, case, official)


def _stages(
    model: HyenaDNA, config: HyenaDNAConfig, ids: Tensor, case: Case, official: dict[str, Any]
) -> dict[str, Tensor]:
    layers: list[Any] = list(model.backbone.layers)
    parts: dict[str, nn.Module] = {"embeddings": model.embed, "last_hidden": model.backbone.norm}
    for i, layer in enumerate(layers):
        parts |= {f"{i}.norm1": layer.norm1, f"{i}.mixer": layer.mixer, f"{i}.mlp": layer.mlp, f"{i}.block": layer}
        if isinstance(layer.mixer, Hyena):
            parts[f"{i}.in_proj"] = layer.mixer.in_proj
    with Capture(parts) as seen:
        hidden, _ = model.forward_features(ids)
    # the official pooling of the Hugging Face port looks for pads, its backbone does not
    pad = official.get("pad_token_id")
    logits = model.forward_head(hidden, None if pad is None else ids != pad)
    out = {"embeddings": seen["embeddings"], "last_hidden": hidden, "logits": logits}
    stream = seen["embeddings"].float()
    for i, layer in enumerate(layers):
        for stage in ("norm1", "mixer", "mlp"):
            out[f"block{i}_{stage}"] = seen[f"{i}.{stage}"]
        # official blocks carry the feed-forward's output and the residual stream before it side by side
        for name in (f"block{i}", f"layer{i}"):
            out[f"{name}_hidden"] = seen[f"{i}.mlp"]
            out[f"{name}_residual"] = stream + seen[f"{i}.mixer"]
        stream = seen[f"{i}.block"]
        out[f"hidden_{i + 1}"] = stream
        if isinstance(layer.mixer, Hyena):
            projected = seen[f"{i}.in_proj"]
            out[f"block{i}_in_proj"] = projected
            out[f"block{i}_filter_k"] = layer.mixer.filter(ids.shape[1]).T
            out[f"block{i}_short_filter_padded"] = _padded_short_filter(layer.mixer, projected)
    out[f"hidden_{len(layers) + 1}"] = hidden
    if "loss" in case.outputs:
        out["loss"] = _loss(logits, case.inputs.get("labels", ids), config, official)
    return out


def _padded_short_filter(mixer: Hyena, projected: Tensor) -> Tensor:
    """The official convolution pads both sides and is cropped afterwards: [B, C, L + taps - 1]."""
    conv, taps = mixer.short_filter, mixer.config.short_filter
    return F.conv1d(projected.transpose(1, 2), conv.weight, conv.bias, padding=taps - 1, groups=conv.groups)


def _loss(logits: Tensor, labels: Tensor, config: HyenaDNAConfig, official: dict[str, Any]) -> Tensor:
    if config.head.kind == "lm":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    kind = official.get("problem_type")
    if kind == "regression" or (kind is None and config.head.num_outputs == 1):
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if kind == "multi_label_classification" or (kind is None and labels.is_floating_point()):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.flatten())


def _operator(case: Case) -> dict[str, Tensor]:
    full = "standalone" not in f"{case.class_name} {case.meta['source'].get('file', '')}"
    config = convert.mixer_config(case.config, shift=0.0, interleaved=full)
    d_model = int(case.config["d_model"])
    rows = convert.mixer_rows("", "", config, d_model)
    state = _settle(case.state, rows)
    ours = rows_to_ours(rows, state, "the case's weights")
    _same_state(rows_to_official(rows, ours, "ours"), state)
    mixer = Hyena(d_model, config).eval()
    load_strict(mixer, ours, "the case's weights")
    x = case.inputs["x"].clone().requires_grad_()
    y, _ = mixer(x, CAUSAL)
    loss = y.square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    out = {"y": y, "loss": loss, "grad_x": x.grad}
    for row in rows:
        if row.ours in grads:
            out[f"grad.{row.official}"] = row.to_official(grads[row.ours])
    with torch.no_grad():
        out |= _operator_stages(mixer, case.inputs["x"], case.outputs)
    return {name: tensor for name, tensor in out.items() if tensor is not None}


def _operator_stages(mixer: Hyena, x: Tensor, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stages [B, C, L]; the short convolution cropped or not, as the case holds it."""
    length, d_model = x.shape[1], mixer.d_model
    projected = mixer.in_proj(x)
    short = _padded_short_filter(mixer, projected)
    wanted = expected.get("short_conv")
    if wanted is None or wanted.shape[-1] == length:
        short = short[..., :length]
    kernels = mixer.kernels(length)
    out = {"in_proj": projected.transpose(1, 2), "short_conv": short, "filter_k": torch.stack([k for k, _ in kernels])}
    *gates, v = short[..., :length].split(d_model, dim=1)
    for i, (gate, (kernel, skip)) in enumerate(zip(reversed(gates[1:]), kernels, strict=True)):
        v = long_conv(v * gate, kernel, skip)
        out[f"longconv_{i}"] = v
    return out


def _settle(state: dict[str, Tensor], rows: list[Row]) -> dict[str, Tensor]:
    """Give tied entries one value, the last in official order: a load copies them one after the other."""
    ours = {row.official: row.ours for row in rows if row.ours is not None}
    last = {ours[name]: tensor for name, tensor in state.items() if name in ours}
    return {name: last[ours[name]] if name in ours else tensor for name, tensor in state.items()}


def _same_state(back: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    if back.keys() != state.keys():
        raise ZooError(f"the converter does not return the official keys: {sorted(back.keys() ^ state.keys())[:3]}")
    for name, tensor in state.items():
        computed = re.search(r"pos_emb\.|modulation\.", name)
        same = torch.allclose(back[name], tensor, atol=1e-5) if computed else torch.equal(back[name], tensor)
        if not same:
            raise ZooError(f"the converter does not return the official value of '{name}'")
