"""Parity of TokenUnify's inputs and targets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.datamodules.volumes import hide_random, keep_prefix


def replay(case: Case) -> dict[str, Tensor]:
    """Prefixes with both fillings, and the random mask, each from a freshly seeded source."""
    config, volume = case.config, case.inputs["volume"].numpy()
    d, h, w = config["patch"]
    source = lambda: np.random.RandomState(config["numpy_seed"])
    out: dict[str, Tensor] = {}
    for i, fill in enumerate((0.0, None)):
        made = keep_prefix(volume, (d, h, w), source(), fill)
        out[f"input_fill{i}"] = torch.from_numpy(made.input)
        out[f"next_patch_fill{i}"] = torch.from_numpy(made.next_patch)
        out["prefix_patches"] = torch.tensor(made.count)
    out["random_masked"] = torch.from_numpy(hide_random(volume, (d, h, w), source(), config["mask_ratio"]))
    return out
