"""Elastic prefixes: representations whose first k entries are useful for every k.

Nested dropout (Rippel et al. 2014, arXiv 1402.0915) as FlexTok (arXiv 2502.13967, section 3.2), MQT (arXiv
2405.19315) and Matryoshka embeddings use it: one k is drawn, and what stands behind it is dropped, masked or not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError

SizeSampling = Literal["uniform", "pow2", "uniform_pow2"]


def sample_keep(
    batch: int,
    n: int,
    mode: SizeSampling = "uniform",
    minimum: int = 1,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """[batch] int64 numbers of entries to keep, between *minimum* and *n*.

    `uniform`: every number alike. `pow2`: powers of two (and n) alike. `uniform_pow2`: a pair of neighbouring powers
    of two, then every number between them, so that small counts are as frequent as large ones.
    """
    if mode == "uniform":
        return torch.randint(minimum, n + 1, (batch,), device=device, generator=generator)
    powers = sorted({2**i for i in range(int(math.log2(n)) + 1) if 2**i >= minimum} | {minimum, n})
    steps = torch.tensor(powers, device=device)
    if mode == "pow2" or len(powers) == 1:
        return steps[torch.randint(len(powers), (batch,), device=device, generator=generator)]
    pair = torch.randint(len(powers) - 1, (batch,), device=device, generator=generator)
    low, high = steps[pair], steps[pair + 1]
    u = torch.rand(batch, device=device, generator=generator)
    return (low + (u * (high - low + 1)).long()).clamp_max(high)


def prefix_mask(keep: Tensor, n: int) -> Tensor:
    """[B] -> [B, n] bool, True for the first `keep` entries."""
    return torch.arange(n, device=keep.device) < keep[:, None]


class NestedDropout(nn.Module):
    """x [B, K, D] with all entries behind the first k replaced by a learned vector (FlexTok keeps their places).

    In training k is drawn for each sample; otherwise nothing is dropped unless *keep* [B] says so.
    """

    def __init__(self, d_model: int, mode: SizeSampling = "uniform") -> None:
        super().__init__()
        self.mode = mode
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            if not self.training:
                return x
            keep = sample_keep(x.shape[0], x.shape[1], self.mode, device=x.device)
        return torch.where(prefix_mask(keep.to(x.device), x.shape[1])[..., None], x, self.mask_token.to(x.dtype))


# --- Matryoshka heads: prefixes in two dimensions, width and depth


@config
class MatryoshkaConfig:
    """Which prefixes of a representation are to be useful by themselves.

    Attributes:
        widths: numbers of leading features, ascending; the last one is the whole width.
        depth: hidden states that are served, counted from the last one back; 1 serves the last alone.
        law: `drawn` trains the whole and one smaller width and one shallower state a step (2DMSE); `all` every pair.
        align: weight of the loss that pulls what shallower states say towards what the last one says.
    """

    widths: tuple[int, ...]
    depth: int = 1
    law: Literal["drawn", "all"] = "drawn"
    align: float = 1.0

    def __post_init__(self) -> None:
        if not self.widths or self.widths[0] < 1 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must be ascending numbers of at least 1, got {list(self.widths)}")
        if self.depth < 1 or self.align < 0:
            raise ValueError(f"depth must be at least 1 and align at least 0, got {self.depth} and {self.align}")


class MatryoshkaHead(nn.Module):
    """One linear layer that classifies by any leading features of any of the last hidden states.

    The layer for w features is the first w columns of the layer for all (Kusupati et al. 2022, "Matryoshka
    Representation Learning", arXiv:2205.13147, section 3, MRL-E); depth is the second dimension (Li et al. 2024, "2D
    Matryoshka Sentence Embeddings", arXiv:2402.14776, section 3).
    """

    Config = MatryoshkaConfig

    def __init__(self, config: MatryoshkaConfig, num_outputs: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.widths[-1], num_outputs)

    def forward(self, hidden: Tensor, width: int | None = None) -> Tensor:
        """Logits [..., num_outputs] by the first *width* features of hidden [..., D] or [..., w >= width].

        Raises:
            ZooError: a width that the head was not made for.
        """
        widths = self.config.widths
        width = widths[-1] if width is None else width
        if width not in widths:
            raise ZooError(f"this head serves the widths {', '.join(map(str, widths))}, not {width}")
        return F.linear(hidden[..., :width], self.linear.weight[:, :width], self.linear.bias)

    def pairs(self, states: int, generator: torch.Generator | None = None) -> list[tuple[int, int]]:
        """(state, width) pairs that one training step looks at; state -1 is the last of *states*, -2 the one before.

        Raises:
            ZooError: fewer hidden states than the head serves.
        """
        c = self.config
        if states < c.depth:
            raise ZooError(f"the head serves the last {c.depth} hidden states, but there are {states}")
        depths, widths = [-1 - i for i in range(c.depth)], list(c.widths)
        if c.law == "drawn":
            depths = [-1, *_one(depths[1:], generator)]
            widths = [*_one(widths[:-1], generator), widths[-1]]
        return [(depth, width) for depth in depths for width in widths]

    def loss(self, hiddens: Sequence[Tensor], labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy over the pairs of a step, and the divergence of shallower states from the last one.

        Args:
            hiddens: pooled hidden states [B, D], the deepest last.
            labels: [B] classes.

        Raises:
            ZooError: see `pairs`.
        """
        pairs = self.pairs(len(hiddens), generator)
        total = torch.stack([F.cross_entropy(self(hiddens[d], w), labels) for d, w in pairs]).mean()
        shallow = sorted({depth for depth, _ in pairs} - {-1})
        if shallow and self.config.align:
            teacher = self(hiddens[-1]).detach().log_softmax(-1)
            gaps = [
                F.kl_div(self(hiddens[d]).log_softmax(-1), teacher, reduction="batchmean", log_target=True)
                for d in shallow
            ]
            total = total + self.config.align * torch.stack(gaps).mean()
        return total


def _one(choices: list[int], generator: torch.Generator | None) -> list[int]:
    """One of *choices*, or none where there are none."""
    return [choices[int(torch.randint(len(choices), (1,), generator=generator))]] if choices else []
