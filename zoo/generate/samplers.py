"""From logits to the law that a token is drawn from: small pure objects, applied in order.

A `Warper` maps logits [N, V] to logits; N are the positions of one forward pass (rows of a batch, nodes of a draft
tree). None of them keeps state, so the same chain serves plain decoding and the verification of drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.generate.noise import Noise

_LOWEST = float("-inf")


@dataclass(frozen=True)
class Context:
    """What a warper may look at besides the logits.

    Attributes:
        step: tokens emitted before each position, [N].
        seen: [N, V] bool, tokens that stand in the prompt or the output before each position; None where no warper
            asked for it.
    """

    step: Tensor
    seen: Tensor | None = None


class Warper(Protocol):
    """A change of logits [N, V]; `needs_seen` asks for `Context.seen`."""

    needs_seen: bool

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        """The changed logits, [N, V]; the argument is left alone."""


@dataclass(frozen=True)
class Ban:
    """These tokens never come out (specials); with `until`, only as long as fewer tokens have."""

    tokens: tuple[int, ...]
    until: int | None = None
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        index = torch.tensor(self.tokens, device=logits.device)
        banned = logits.index_fill(-1, index, _LOWEST)
        return banned if self.until is None else torch.where((context.step < self.until)[:, None], banned, logits)


@dataclass(frozen=True)
class Allow:
    """Only these tokens come out (bases, image codes)."""

    tokens: tuple[int, ...]
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        index = torch.tensor(self.tokens, device=logits.device)
        return torch.full_like(logits, _LOWEST).index_copy(-1, index, logits.index_select(-1, index))


@dataclass(frozen=True)
class Repetition:
    """Logits of tokens seen before are divided by the penalty where positive and multiplied where negative (CTRL,
    arXiv:1909.05858, §4.1)."""

    penalty: float
    needs_seen = True

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        assert context.seen is not None
        weaker = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(context.seen, weaker, logits)


@dataclass(frozen=True)
class Temperature:
    """Logits over the temperature."""

    value: float
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        return logits / self.value


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens stay (all that tie with the k-th)."""

    k: int
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        least = logits.topk(min(self.k, logits.shape[-1]), dim=-1).values[:, -1:]
        return logits.masked_fill(logits < least, _LOWEST)


@dataclass(frozen=True)
class TopP:
    """The fewest likeliest tokens whose probabilities reach p stay (nucleus sampling, arXiv:1904.09751)."""

    p: float
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.float().softmax(-1)
        drop = probability.cumsum(-1) - probability >= self.p  # the mass before the token suffices already
        return logits.masked_fill(drop.scatter(-1, index, drop), _LOWEST)


@dataclass(frozen=True)
class MinP:
    """Tokens less likely than p times the likeliest go (arXiv:2407.01082)."""

    p: float
    needs_seen = False

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        probability = logits.float().softmax(-1)
        return logits.masked_fill(probability < self.p * probability.amax(-1, keepdim=True), _LOWEST)


def warp(logits: Tensor, warpers: Sequence[Warper], context: Context) -> Tensor:
    """All *warpers* one after the other."""
    for warper in warpers:
        logits = warper(logits, context)
    return logits


def draw(law: Tensor, noise: Noise) -> int:
    """A token of *law* [V] (need not sum to 1) by inverting its distribution function at one uniform number."""
    total = law.double().cumsum(-1)
    target = noise.uniform() * total[-1]
    index = int(torch.searchsorted(total, target, right=True))
    return min(index, int(law.nonzero()[-1])) if index >= len(law) or law[index] <= 0 else index


def draw_rows(logits: Tensor, noises: Sequence[Noise]) -> Tensor:
    """A token [N] from softmax(logits) of each row, each from its own noise."""
    total = logits.double().softmax(-1).cumsum(-1)  # [N, V]
    u = torch.tensor([noise.uniform() for noise in noises], dtype=torch.float64, device=logits.device)
    index = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]
    return index.clamp_max(logits.shape[-1] - 1)
