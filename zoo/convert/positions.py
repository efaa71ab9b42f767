"""Replay of the parity cases of position schemes: Giraffe's stretched bases and V2PE's fractional positions."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.errors import ZooError
from zoo.nn.positions import RotaryConfig, frequencies, rotary, rotate
from zoo.nn.visual_positions import image_spans, random_strides, visual_positions


def replay_giraffe(case: Case) -> dict[str, Tensor]:
    """Frequencies, cosines and sines of every combination of options."""
    dim, base = int(case.config["dim"]), float(case.config.get("base", 10000.0))
    position = case.inputs["positions"]
    out: dict[str, Tensor] = {}
    for i, options in enumerate(case.config["options"]):
        scheme = giraffe_options(options, base)
        cos, sin = rotary(scheme, dim, position)
        out |= {f"freq_{i}": frequencies(scheme, dim), f"cos_{i}": torch.cat([cos, cos], -1)}
        out[f"sin_{i}"] = torch.cat([sin, sin], -1)
    return out


def giraffe_options(options: dict[str, Any], base: float) -> RotaryConfig:
    """The official constructor's options.

    Raises:
        ZooError: an option that is none of scale, scale_power and truncate.
    """
    unknown = set(options) - {"scale", "scale_power", "truncate"}
    if unknown:
        raise ZooError(f"giraffe: unknown option '{sorted(unknown)[0]}' (known: scale, scale_power, truncate)")
    scale = options.get("scale")
    return RotaryConfig(
        base=base,
        scaling="none" if scale in (None, 1, 1.0) else "linear",
        factor=float(scale or 1.0),
        power=float(options.get("scale_power") or 0.0),
        truncate=int(options.get("truncate") or 0),
    )


def replay_v2pe(case: Case) -> dict[str, Tensor]:
    """Positions at every stride, of one sequence (`positions_stride*`) or several (`pos_<i>_*`), and their rotation."""
    cfg = case.config
    if "num_image_token" not in cfg:
        ids = case.inputs["input_ids"][0]
        return {
            f"positions_stride{stride}": visual_positions(
                ids, cfg["img_start"], cfg["img_end"], stride / cfg["tokens_per_tile"]
            )
            for stride in cfg["strides"]
        }
    out: dict[str, Tensor] = {}
    start, end, tokens = cfg["image_start_token_id"], cfg["image_end_token_id"], cfg["num_image_token"]
    for name, value in case.inputs.items():
        match = re.fullmatch(r"input_ids_(\d+)", name)
        if match is None:
            continue
        i, ids = int(match[1]), value[0]
        out[f"pos_{i}_default"] = torch.arange(len(ids))
        for stride in cfg["strides"]:
            out[f"pos_{i}_fix{stride}"] = visual_positions(ids, start, end, stride / tokens)
        drawn = random_strides(len(image_spans(ids, start, end)), cfg["rnd_choices"], cfg["rnd_seed"][i])
        out[f"rnd_strides_{i}"] = torch.tensor(drawn)
        out[f"pos_{i}_rnd"] = visual_positions(ids, start, end, [stride / tokens for stride in drawn])
    cos, sin = rotary(RotaryConfig(base=float(cfg["base"])), int(cfg["head_dim"]), out[cfg["rotary_uses"]])
    out |= {"cos": torch.cat([cos, cos], -1), "sin": torch.cat([sin, sin], -1)}
    for name in ("q", "k"):
        if name in case.inputs:  # [B, H, L, d]
            out[f"{name}_rot"] = rotate(case.inputs[name].transpose(1, 2), cos, sin).transpose(1, 2)
    return out
