"""Replay of the parity cases of GlobalCom²."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.nn.globalcom2 import compress
from zoo.nn.token_reduction import best_resolution


def replay(case: Case) -> dict[str, Tensor]:
    """The grid, every crop's share, scores and choice, and the tokens that are left."""
    cfg, given = case.config, case.inputs
    width, height = cfg["image_size_wh"]
    choices = [(int(a), int(b)) for a, b in cfg["image_grid_pinpoints"]]
    best = best_resolution((width, height), choices)
    columns, rows = best[0] // cfg["crop"], best[1] // cfg["crop"]
    found = compress(
        given["features"],
        given["cls_attn_scores"],
        given["image_newline"],
        (height, width),
        (rows, columns),
        float(cfg["retention_ratio"]),
        float(cfg["temperature"]),
    )
    crops = found.crop_tokens.half().float()  # the official code casts them
    thumbnail = given["features"][0][found.thumbnail]
    out = {
        "grid_wh": torch.tensor([columns, rows]),
        "thumbnail_indices": found.thumbnail,
        "thumbnail_tokens": thumbnail,
        "valid_per_crop": found.valid,
        "crop_retention": found.share.float(),
        "crop_tokens": crops,
        "final_tokens": torch.cat([thumbnail, crops]),
    }
    for i, (scores, kept) in enumerate(zip(found.guidance, found.kept, strict=True)):
        out |= {f"crop{i}.global_scores": scores, f"crop{i}.kept_indices_in_unpadded": kept}
    return out
