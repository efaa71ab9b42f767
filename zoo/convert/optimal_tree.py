"""The optimal sparse tree (hmarkc/parallel-prompt-decoding) against its parity cases."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.generate.draft import optimal_tree


def replay(case: Case) -> dict[str, Tensor]:
    """Paths and products for every size; the official code rounds products to five decimals."""
    accuracy = case.inputs["accuracies"]
    out: dict[str, Tensor] = {}
    for size in case.config["sizes"]:
        paths = optimal_tree(accuracy, int(size))
        deepest = max(map(len, paths))
        products = [torch.stack([accuracy[d, r] for d, r in enumerate(path)]).prod() for path in paths]
        out[f"paths_{size}"] = torch.tensor([list(path) + [-1] * (deepest - len(path)) for path in paths])
        out[f"acc_{size}"] = torch.tensor([round(float(product), 5) for product in products])
    return out
