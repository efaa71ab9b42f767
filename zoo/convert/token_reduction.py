"""Replay of the parity cases of training-free token reduction: HiRED and M3's pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.nn.token_reduction import best_resolution, cls_attention, hired_mask, hired_pack, pool_tokens


def replay_m3(case: Case) -> dict[str, Tensor]:
    """`tokens_<n>` for every n that is asked for."""
    features = case.inputs["image_features"]
    wanted = [int(name.removeprefix("tokens_")) for name in case.outputs if name.startswith("tokens_")]
    return {f"tokens_{n}": pool_tokens(features, n) for n in wanted}


def replay_hired(case: Case) -> dict[str, Tensor]:
    """Class attention of both layers, and for every picture its grid, its mask and what is packed."""
    cfg, given = case.config, case.inputs
    heads, rate = int(cfg["num_heads"]), float(cfg["token_budget_rate"])
    layers = {"top": cfg["vit_top_layer"], "bottom": cfg["vit_bottom_layer"]}
    seen = {
        name: cls_attention(given[f"query_layer{at}"], given[f"key_layer{at}"], heads) for name, at in layers.items()
    }
    out = {f"attn_layer{at}_cls": seen[name] for name, at in layers.items()}
    top, bottom = seen["top"].sum(1), seen["bottom"].sum(1)
    out["llava15_mask"] = hired_mask(top[:1], bottom[:1], (1, 1), rate, 1.0)[0]
    choices = [(int(a), int(b)) for a, b in cfg["image_grid_pinpoints"]]
    packed, start = [], 0
    for i, (views, size) in enumerate(zip(cfg["num_patches"], cfg["image_sizes_hw"], strict=True)):
        part = slice(start, start + views)
        best = best_resolution((size[0], size[1]), choices)
        grid = (best[0] // cfg["image_size"], best[1] // cfg["image_size"])
        mask = hired_mask(top[part], bottom[part], grid, rate, float(cfg["alpha"]))
        out |= {f"grid_shape_{i}": torch.tensor(grid), f"mask_{i}": mask, f"kept_per_partition_{i}": mask.sum(1)}
        packed.append(hired_pack(given["features"][part], mask, grid[::-1], (size[0], size[1])))
        start += views
    return out | {"packed_lens": torch.tensor([len(t) for t in packed]), "packed_features": torch.cat(packed)}
