"""Finite scalar quantization: each dimension rounds to a few levels (Mentzer et al. 2023, arXiv 2309.15505)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.codebook import Quantized


@config
class FSQConfig:
    """An implicit codebook of product(levels) codes; FlexTok and Cosmos use 8·8·8·5·5·5 = 64,000.

    Attributes:
        levels: number of values of each dimension, at least 2.
        drop_quant: in training, the probability that a sample (first axis) is passed on unrounded.
        corrupt: in training, the probability that a token is replaced by a random code.
        truncate_ids: cut the index arithmetic to an integer instead of rounding it, as FlexTok's code does. It
            differs for single levels such as 26, 27, 38 or 39, whose ids then do not round-trip.
        tan_shift: bound with a shift by tan in place of atanh and a range narrowed by the slack, as the first published
            code of FSQ did; NBP's weights need it.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    drop_quant: float = 0.0
    corrupt: float = 0.0
    truncate_ids: bool = False
    tan_shift: bool = False

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels must hold numbers of at least 2, got {list(self.levels)}")


class FSQ(nn.Module):
    """z [..., D] -> Quantized, codes in [-1, 1]; no parameters and no loss.

    Index layout: id = sum_d digit_d · prod(levels[:d]) with digit = code · (L // 2) + L // 2, so that dimension 0 is
    the LEAST significant digit (FlexTok, Cosmos and vector-quantize-pytorch agree).
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.dim = math.prod(config.levels), len(config.levels)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer(
            "basis", torch.cumprod(torch.cat([torch.ones(1, dtype=torch.long), levels[:-1]]), 0), persistent=False
        )

    def bound(self, z: Tensor, slack: float = 1e-3) -> Tensor:
        """Squash each dimension into the range whose rounding gives exactly its L values; *slack* keeps tanh off 1."""
        early = self.config.tan_shift
        half = (self.levels - 1) * (1 - slack if early else 1 + slack) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.tan(offset / half) if early else torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            bounded = self.bound(z)
            half = self.levels // 2
            rounded = bounded + (bounded.round() - bounded).detach()
            ids = self.to_ids(rounded.detach() / half)
            codes = rounded / half
            if self.training and self.config.corrupt:
                hit = torch.rand(ids.shape, device=z.device) < self.config.corrupt
                ids = torch.where(hit, torch.randint_like(ids, self.vocab_size), ids)
                codes = codes + (torch.where(hit[..., None], self.lookup(ids), codes) - codes).detach()
            if self.training and self.config.drop_quant:
                raw = torch.rand(len(z), *[1] * (z.ndim - 1), device=z.device) < self.config.drop_quant
                codes = torch.where(raw, bounded / half, codes)
        return Quantized(codes, ids, z.new_zeros(()))

    def to_ids(self, codes: Tensor) -> Tensor:
        """[..., D] codes -> [...] int64."""
        half = self.levels // 2
        digits = codes * half + half
        if self.config.truncate_ids:
            return (digits * self.basis).sum(-1).to(torch.int32).to(torch.long)
        return (digits.round().to(torch.long) * self.basis).sum(-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """[...] int -> [..., D] codes."""
        half = self.levels // 2
        digits = (ids[..., None] // self.basis) % self.levels
        return (digits - half) / half
