"""What all quantizers return, and how well a codebook is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Quantized:
    """Result of a quantizer. The code dimension is the last axis everywhere.

    Attributes:
        codes: [..., D] quantized vectors; gradients pass straight through to the quantizer's input.
        ids: [...] int64 indices into the codebook.
        loss: scalar to be added to the training loss (0 where the quantizer needs none).
        parts: terms of the loss and diagnostics by name, for logging.
    """

    codes: Tensor
    ids: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def codebook_usage(ids: Tensor, size: int) -> dict[str, float]:
    """How much of a codebook of *size* codes the indices *ids* (any shape) use.

    Returns `usage` (fraction of codes seen), `entropy` (bits; of p + 1e-8, as in TiTok's evaluator) and `perplexity`
    (2 to the exact entropy: the number of equally frequent codes that would carry as much).
    """
    return usage_of_counts(torch.bincount(ids.reshape(-1).to(torch.long).cpu(), minlength=size))


def usage_of_counts(counts: Tensor) -> dict[str, float]:
    """As `codebook_usage`, from how often each code was seen, [size]."""
    size, counts = len(counts), counts.cpu().double()
    p = counts / counts.sum().clamp_min(1)
    exact = -(p * torch.where(p > 0, p, torch.ones_like(p)).log2()).sum().item()
    entropy = -(p * (p + 1e-8).log2()).sum().item()
    return {"usage": int((counts > 0).sum()) / size, "entropy": entropy, "perplexity": math.pow(2.0, exact)}


def gather_rows(x: Tensor) -> Tensor:
    """[N, D] -> [world·N, D]: the rows of all ranks (codebook statistics must see the whole batch), no gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
