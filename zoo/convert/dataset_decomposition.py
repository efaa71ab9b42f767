"""Cases of dataset decomposition (apple/ml-dataset-decomposition): which pieces documents are cut into."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.datamodules.buckets import decompose, get_binary


def replay(case: Case) -> dict[str, Tensor]:
    """Run a case: `doc_lengths` are cut one by one, each with its own seed, `lengths` in one go."""
    low, high = int(case.config["min_log2"]), int(case.config["max_log2"])
    if "doc_lengths" in case.inputs:
        out = {}
        for i, length in enumerate(case.inputs["doc_lengths"].tolist()):
            for name, random in (("greedy", None), ("random", np.random.RandomState(i))):
                pieces = get_binary(length, low, high, random)
                rows = sorted((k, 1000 * i + start, (1 << k) + 1) for k, start in pieces)  # document i starts at 1000 i
                out[f"{name}_{i}"] = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
        return out
    lengths = case.inputs["lengths"].tolist()
    seed = int(case.config.get("numpy_seed", 0))
    return {
        name: _with_length(decompose(lengths, low, high, s)) for name, s in (("greedy", None), ("randomized", seed))
    }


def _with_length(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.column_stack([rows, (1 << rows[:, 1]) + 1]))
