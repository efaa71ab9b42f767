"""H3 (HazyResearch/H3): official layers and language models <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.config import to_dict
from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.common import block_streams, given_prefill, gradients, linear, load, next_token_loss, squeeze
from zoo.convert.parity import Case
from zoo.errors import ConfigError
from zoo.models.lm import LM, LMConfig
from zoo.nn.backbone import LayerSpec
from zoo.nn.h3 import H3, H3Config
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import CAUSAL
from zoo.nn.mlp import MLPConfig

WHAT = "H3 weights"
MODEL = "lm"  # the family of zoo.models these weights become


def mixer_rows(official: str, ours: str) -> list[Row]:
    """The table of one H3 layer, in official order."""
    shift, diag, system = official + "ssm_k_kernel.kernel.", official + "kernel.kernel.", ours + "system."
    rows = [Row(official + "ssm_k_D", ours + "shift_skip"), Row(official + "D", ours + "skip")]
    for name in ("q_proj", "k_proj", "v_proj"):
        rows += linear(official + name, ours + name)
    rows += [
        Row(shift + "B", ours + "shift_b"),
        Row(shift + "C", ours + "shift_c", *squeeze(0)),
        Row(diag + "C", system + "c"),
        Row(diag + "log_dt", system + "log_dt"),
        Row(diag + "B", system + "b"),
        Row(diag + "inv_A_real", system + "a_real"),
        Row(diag + "A_imag", system + "a_imag"),
    ]
    return rows + linear(official + "output_linear", ours + "out_proj")


def mixer_config(official: Mapping[str, Any]) -> H3Config:
    """Arguments of H3 (or a model's ssm_cfg) -> ours.

    Raises:
        ConfigError: a kernel other than the diagonal one, or a transform of A other than exp.
    """
    mode = official.get("mode", "diag")
    if mode != "diag" or official.get("real_type", "exp") != "exp" or official.get("bandlimit") is not None:
        raise ConfigError(f"H3 with mode={mode!r} is not offered here: only diagonal kernels with real_type 'exp'")
    measure = str(official.get("measure", "diag-lin"))
    return H3Config(
        d_state=int(official.get("d_state", 64)), head_dim=int(official.get("head_dim", 1)),
        init={"diag-inv": "inv", "diag-real": "real"}.get(measure, "lin"),  # type: ignore[arg-type]
        disc=official.get("disc", "bilinear"), lr=official.get("lr"),
        dt_min=float(official.get("dt_min", 1e-3)), dt_max=float(official.get("dt_max", 0.1)),
    )  # fmt: skip


def table(config: LMConfig) -> list[Row]:
    """Every official entry of a language model, in official order."""
    rows = [Row("backbone.embeddings.word_embeddings.weight", "embed.weight")]
    for i, spec in enumerate(config.layers):
        layer = f"backbone.layers.{i}."
        if spec.mixer == "h3":
            rows += mixer_rows(layer + "mixer.", layer + "mixer.")
        else:
            rows += linear(layer + "mixer.Wqkv", layer + "mixer.qkv")
            rows += linear(layer + "mixer.out_proj", layer + "mixer.out_proj")
        for name in ("norm1", "mlp.fc1", "mlp.fc2", "norm2"):
            rows += linear(layer + name, layer + name)
    rows += linear("backbone.ln_f", "backbone.norm")
    return [*rows, Row("lm_head.weight", "embed.weight", first=False)]


def to_zoo(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Official state dict of a language model -> ours; the names and block order of older files are understood.

    Raises:
        ZooError: a missing or unknown key, or an untied head.
    """
    return rows_to_ours(table(config), current_names(state), WHAT)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An older file's state dict in today's names: there each norm stood after its sub-layer, the first one apart."""
    renames = (
        (r"^s4seq\.encoder\.", "backbone."), (r"^embedding\.", "backbone.embeddings.word_embeddings."),
        (r"^backbone\.norm\.", "backbone.ln_f."),
    )  # fmt: skip
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for old, new in renames:
            key = re.sub(old, new, key)
        out[key] = tensor
    if "backbone.ln_0.weight" not in out:
        return out
    moved: dict[str, Tensor] = {}
    last = max(int(key.split(".")[2]) for key in out if key.startswith("backbone.layers."))
    for key, tensor in out.items():
        found = re.fullmatch(r"backbone\.layers\.(\d+)\.norm([12])\.(\w+)", key)
        if key.startswith("backbone.ln_0."):
            key = key.replace("ln_0", "layers.0.norm1")
        elif found and found[2] == "1":
            key = f"backbone.layers.{found[1]}.norm2.{found[3]}"
        elif found and int(found[1]) == last:
            key = f"backbone.ln_f.{found[3]}"
        elif found:
            key = f"backbone.layers.{int(found[1]) + 1}.norm1.{found[3]}"
        moved[key] = tensor
    return moved


def recognises(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are weights of an H3 language model."""
    return any(key.endswith(".ssm_k_kernel.kernel.C") for key in state)


def to_official(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Ours -> official state dict of a language model."""
    return rows_to_official(table(config), state, WHAT)


def config_from_official(official: Mapping[str, Any]) -> LMConfig:
    """Arguments of SSMLMHeadModel -> ours."""
    width = int(official["d_model"])
    attention = dict(official.get("attn_cfg") or {})
    mlp = MLPConfig(kind="gelu_tanh", width=int(official.get("d_inner") or 4 * width))
    options: dict[str, Any] = {"heads": int(attention.get("num_heads", 1)), "bias": True, "out_bias": True}
    if attention.get("rotary_emb_dim"):  # without it the attention layers know no positions
        options["rope"] = {"dim": int(attention["rotary_emb_dim"])}
    h3 = LayerSpec(mixer="h3", options=_fields(mixer_config(official.get("ssm_cfg") or {})), mlp=mlp)
    other = LayerSpec(mixer="attention", options=options, mlp=mlp)
    places = set(official.get("attn_layer_idx") or ())
    return LMConfig(
        d_model=width, vocab_size=int(official["vocab_size"]), norm="layernorm",
        vocab_multiple=int(official.get("pad_vocab_size_multiple", 1)),
        layers=tuple(other if i in places else h3 for i in range(int(official["n_layer"]))),
        eps=float(official.get("layer_norm_epsilon", 1e-5)),
        embed_dropout=float(official.get("embed_dropout", 0.1)),
        resid_dropout=float(official.get("resid_dropout", 0.0)),
        residual_in_fp32=bool(official.get("residual_in_fp32", False)), head=HeadConfig(tied=True),
    )  # fmt: skip


def _fields(config: H3Config) -> dict[str, Any]:
    default = to_dict(H3Config())
    return {key: value for key, value in to_dict(config).items() if value != default[key]}


def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of the layer or of the language model."""
    return _replay_lm(case) if "vocab_size" in case.config else _replay_layer(case)


def _replay_layer(case: Case) -> dict[str, Tensor]:
    config, rows = mixer_config(case.config), mixer_rows("", "")
    layer = load(H3(int(case.config["d_model"]), config), rows, case.state, WHAT)
    x = case.inputs["x"].clone().requires_grad_()
    batch, length, _ = x.shape
    y, _ = layer(x, CAUSAL)
    loss = y.square().mean()
    loss.backward()
    out = {"y": y, "loss": loss, "grad_x": x.grad, **gradients(layer, rows, WHAT)}
    with torch.no_grad():
        taps = layer.shift_kernel(torch.float32)
        out["shift_kernel"] = torch.nn.functional.pad(taps, (0, max(0, length - taps.shape[1])))[None, :, :length]
        out["diag_kernel"] = layer.system.kernel(length)
        prefill = given_prefill(case, 24)
        state: Any = layer.init_state(batch, length)
        part, state = layer(x[:, :prefill], CAUSAL, state)
        out |= _official_state(layer, state.h, x[:, :prefill], "prefill")
        parts = [part]
        for t in range(prefill, length):
            step, state = layer.step(x[:, t], state)
            parts.append(step[:, None])
        out["y_prefill_step"] = torch.cat(parts, 1)
        return out | _official_state(layer, state.h, x, "final")


def _official_state(layer: H3, h: Tensor, x: Tensor, name: str) -> dict[str, Tensor]:
    """Official states hold B: the diagonal one times it, the shift one convolved with it."""
    h = (h * layer.system.input_gain().to(h.dtype)).flatten(0, 1)
    size = layer.config.d_state
    keys = torch.nn.functional.pad(layer.k_proj(x), (0, 0, size, 0))[:, -size:].flip(1)  # newest first
    shift = torch.stack([(layer.shift_b[:, : n + 1].flip(-1).T * keys[:, : n + 1]).sum(1) for n in range(size)], dim=-1)
    return {
        f"{name}_state_diag_re": h.real, f"{name}_state_diag_im": h.imag, f"{name}_state_shift": shift,
    }  # fmt: skip


@torch.no_grad()
def _replay_lm(case: Case) -> dict[str, Tensor]:
    config = config_from_official(case.config)
    model = load(LM(config), table(config), case.state, WHAT)
    ids = case.inputs["input_ids"]
    with block_streams(model) as seen:
        logits = model(ids)
    out = {"embeddings": seen["embeddings"], "logits": logits, "loss": next_token_loss(logits, ids)}
    for i in range(len(config.layers)):
        out[f"layer{i}_residual"] = seen[f"residual{i}"]
        out[f"layer{i}_out"] = out[f"layer{i}_mixer_mlp_out"] = seen[f"mlp{i}"]
    return out
