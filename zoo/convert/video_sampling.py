"""Parity of the choice of frames with NBP's video reader."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.datamodules.clips import clip_indices


def replay(case: Case) -> dict[str, Tensor]:
    """Frame numbers and masks of each listed choice; the official padding shows as frame 0 with mask 0."""
    out: dict[str, Tensor] = {}
    for i, row in enumerate(case.config["cases"]):
        seed = row["python_seed"]
        indices, mask = clip_indices(
            row["total_frames"],
            row["num_frm"],
            strategy=row["strategy"],
            video_fps=row["video_fps"],
            fps=row["fps"],
            generator=None if seed is None else random.Random(seed),
        )
        out[f"frames_{i}"] = torch.from_numpy(np.where(mask, indices, 0))
        out[f"mask_{i}"] = torch.from_numpy(mask).to(torch.uint8)
    return out
