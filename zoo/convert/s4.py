"""S4 and S4D (state-spaces/s4): official layers <-> ours. Sources: models/s4/s4.py S4Block, models/s4/s4d.py S4D."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.common import gradients, load, negate, squeeze, unsqueeze
from zoo.convert.parity import Case
from zoo.errors import ConfigError
from zoo.nn.layout import CAUSAL, FULL
from zoo.nn.s4 import S4, S4D, S4Config, S4DConfig
from zoo.nn.ssm import DiagonalSSM

WHAT = "S4 weights"
Config = S4Config | S4DConfig


def table(config: Config) -> list[Row]:
    """Every official entry of a layer, in official order."""
    system = "system."
    if isinstance(config, S4DConfig):
        return [
            Row("D", "skip", *unsqueeze(0)),
            Row("kernel.C", system + "c", *unsqueeze(0)),
            Row("kernel.log_dt", system + "log_dt"),
            Row("kernel.log_A_real", system + "a_real"),
            Row("kernel.A_imag", system + "a_imag"),
            Row("output_linear.0.weight", "out_proj.weight", *squeeze(-1)),  # a 1x1 convolution there
            Row("output_linear.0.bias", "out_proj.bias"),
        ]
    kernel = "layer.kernel."
    rows = [
        Row("layer.D", "skip"),
        Row(kernel + "inv_dt", system + "log_dt", *squeeze(-1)),
        Row(kernel + "C", system + "c"),
        Row(kernel + "B", system + "b", *squeeze(0)),
        Row(kernel + "A_real", system + "a_real"),
        Row(kernel + "A_imag", system + "a_imag", negate, negate),  # A = -exp(A_real) - i A_imag there
    ]
    if config.mode == "dplr":
        rows.append(Row(kernel + "P", system + "p"))
        rows.append(Row(kernel + "l_kernel", None, value=lambda: torch.tensor(config.kernel_len)))
    head = "output_linear.0." if config.gated else "output_linear."
    return [*rows, Row(head + "weight", "out_proj.weight"), Row(head + "bias", "out_proj.bias")]


def to_zoo(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Official state dict -> ours. A `dplr` layer's C~ is kept as stored; `config.kernel_len` says of which length.

    Raises:
        ZooError: a missing or unknown key, or an l_kernel that is not config.kernel_len.
    """
    return rows_to_ours(table(config), state, WHAT)


def to_official(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Ours -> official state dict."""
    return rows_to_official(table(config), state, WHAT)


def config_from_official(official: Mapping[str, Any], standalone: bool | None = None) -> Config:
    """Arguments of S4D (*standalone*, assumed when no S4Block argument is given) or of S4Block -> ours.

    Raises:
        ConfigError: an argument that changes the computation in a way ours does not offer.
    """
    known = {"d_model", "d_state", "dropout", "transposed", "dt_min", "dt_max", "lr", "class"}
    if standalone is None:
        standalone = not set(official) - known
    fields = {key: official[key] for key in ("dt_min", "dt_max", "dropout") if key in official}
    fields["d_state"] = int(official.get("d_state", 64))
    if standalone:
        unknown = sorted(set(official) - known)
        if unknown:
            raise ConfigError(f"S4D has no argument '{unknown[0]}'")
        return S4DConfig(**fields)
    fixed = {
        "dt_transform": "exp", "dt_tie": True, "real_transform": "exp", "imag_transform": "none", "channels": 1,
        "bottleneck": None, "gate": None, "mult_act": None, "activation": "gelu", "n_ssm": None, "is_real": False,
        "dt_fast": False, "bandlimit": None, "weight_norm": False,
    }  # fmt: skip
    for key, value in fixed.items():
        if official.get(key, value) != value:
            raise ConfigError(f"S4Block with {key}={official[key]!r} is not offered here (only {value!r})")
    mode = {"diag": "diag", "s4d": "diag"}.get(official.get("mode", official.get("kernel") or "dplr"), "dplr")
    init = str(official.get("init", "legs"))
    if mode == "diag":
        fields["init"] = {"diag-lin": "lin", "diag-inv": "inv", "diag-real": "real"}.get(init, "lin")
        fields["disc"] = official.get("disc", "zoh")
    final = official.get("final_act", "glu")
    if final not in ("glu", "id"):
        raise ConfigError(f"S4Block with final_act={final!r} is not offered here (glu or id)")
    return S4Config(
        mode=mode,  # type: ignore[arg-type]
        rank=int(official.get("rank", 1)), max_kernel=official.get("l_max"), gated=final == "glu",
        bidirectional=bool(official.get("bidirectional", False)), **fields,
    )  # fmt: skip


def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of S4D or S4Block."""
    standalone = "s4d.py" in case.class_name or case.class_name == "S4D"
    config = config_from_official(case.config, standalone)
    width = int(case.config["d_model"])
    if isinstance(config, S4Config) and "layer.kernel.l_kernel" in case.state:
        config = dataclasses.replace(config, kernel_len=int(case.state["layer.kernel.l_kernel"]))
    rows = table(config)
    layer = load(S4D(width, config) if isinstance(config, S4DConfig) else S4(width, config), rows, case.state, WHAT)
    transposed = bool(case.config.get("transposed", True))

    def flip(t: Tensor) -> Tensor:
        return t.transpose(1, 2) if transposed else t

    x = case.inputs["x"].clone().requires_grad_()
    length = flip(x).shape[1]
    y, _ = layer(flip(x), FULL if config.bidirectional else CAUSAL)
    loss = y.square().mean()
    loss.backward()
    out = {"y": flip(y), "loss": loss, "grad_x": x.grad, **gradients(layer, rows, WHAT)}
    with torch.no_grad():
        wanted = case.outputs.get("kernel")
        taps = length if wanted is None else wanted.shape[-1]
        kernel = layer.system.kernel(taps)
        out["kernel"] = kernel[0] if wanted is not None and wanted.ndim == 2 else kernel
        u = flip(x).transpose(1, 2)
        out["ssm_out"] = layer.convolve(u, None, None)[0] - layer.skip[0, :, None] * u
        if not config.bidirectional:
            out |= _stepwise(layer, flip(x), case, flip)
    return out


def _stepwise(layer: S4 | S4D, x: Tensor, case: Case, flip: Any) -> dict[str, Tensor]:
    layer.decodes = True  # the recurrence of a cut kernel is asked for only within its taps
    state: Any = layer.init_state(x.shape[0], x.shape[1])
    steps = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    h = state.h
    if not h.is_complex():
        h = torch.complex(*h.chunk(2, dim=-1))
    wanted = case.outputs.get("state_re")
    if wanted is not None:
        if isinstance(layer.system, DiagonalSSM):  # official states hold B and the discretisation's factor
            h = h * layer.system.input_gain().to(h.dtype)
        if wanted.shape[-1] == 2 * h.shape[-1]:  # both halves of the conjugate pairs
            h = torch.cat([h, h.conj()], dim=-1)
    return {
        "y_step": flip(torch.stack(steps, dim=1)),
        **{f"{name}_{part}": getattr(h, kind) for name in ("state", "final_state")
           for part, kind in (("re", "real"), ("im", "imag"))},
    }  # fmt: skip
