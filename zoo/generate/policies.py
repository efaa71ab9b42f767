"""Rules of caches that forget: StreamingLLM, LM-Infinite and the two algorithms that H2O's authors published."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.nn.policy import Held, Meeting


def sinks_and_recents(held: Held, sinks: int, recents: int) -> Tensor | None:
    """[1, 1, m] indices of the first *sinks* and the last *recents* cached tokens; None where that is all."""
    if held.size <= sinks + recents:
        return None
    index = torch.arange(held.size, device=held.position.device)
    return torch.cat([index[:sinks], index[held.size - recents :]])[None, None]


def heavy(score: Tensor, count: int) -> Tensor:
    """[..., count] indices of the largest scores, ascending."""
    return score.topk(min(count, score.shape[-1]), dim=-1).indices.sort(-1).values


class _Rule:
    """What most rules share: all kept tokens are visible, no statistic."""

    scored = False

    def visible(self, held: Held) -> Tensor | None:
        return None

    def score(self, score: Tensor, weights: Tensor) -> Tensor:
        return score + weights.sum(2)

    def _new(self, held: Held, first: int) -> Tensor:
        return torch.arange(first, first + held.new, device=held.position.device)


@dataclass(frozen=True)
class StreamingLLM(_Rule):
    """The first `sinks` and the last `recents` tokens; positions are places in the cache (arXiv:2309.17453, §3.2)."""

    sinks: int = 4
    recents: int = 512

    @property
    def bound(self) -> int:
        return self.sinks + self.recents

    def address(self, held: Held) -> list[Meeting]:
        return [Meeting(self._new(held, held.old), torch.arange(held.size, device=held.position.device))]

    def keep(self, held: Held) -> Tensor | None:
        return sinks_and_recents(held, self.sinks, self.recents)


@dataclass(frozen=True)
class LMInfinite(_Rule):
    """A lambda-shaped mask and clamped distances (arXiv:2308.16137, §4).

    A query sees the `recents` tokens up to its own, and the first `sinks`; those of the latter that are further away
    stand at the distance `limit` (None: recents).
    """

    sinks: int = 10
    recents: int = 4096
    limit: int | None = None

    @property
    def bound(self) -> int:
        return self.sinks + self.recents

    def _distance(self, held: Held) -> Tensor:
        return self._new(held, held.seen)[:, None] - held.position[:, :, None]  # [B, H, n, S]

    def visible(self, held: Held) -> Tensor:
        return (self._distance(held) < self.recents) | (held.position < self.sinks)[:, :, None]

    def address(self, held: Held) -> list[Meeting]:
        query = self._new(held, held.seen)
        limit = self.recents if self.limit is None else self.limit
        far = self._distance(held) >= self.recents
        clamped = torch.full_like(query, min(limit, held.seen + held.new - 1))
        key = held.position[0, 0]  # the same in all rows and heads
        return [Meeting(query, key), Meeting(clamped, torch.zeros_like(key), far)]

    def keep(self, held: Held) -> Tensor | None:
        return sinks_and_recents(held, self.sinks, self.recents)


@dataclass(frozen=True)
class H2O(_Rule):
    """The `heavy` tokens with most attention so far and the last `recents` (arXiv:2306.14048, §4.1), each key head
    for itself; positions are the true ones."""

    heavy: int = 64
    recents: int = 64
    scored = True

    @property
    def bound(self) -> int:
        return self.heavy + self.recents

    def address(self, held: Held) -> list[Meeting]:
        return [Meeting(self._new(held, held.seen), held.position)]

    def keep(self, held: Held) -> Tensor | None:
        if held.size <= self.bound:
            return None
        assert held.score is not None
        first = held.size - self.recents
        best = heavy(held.score[:, :, :first], self.heavy)
        recent = torch.arange(first, held.size, device=best.device).expand(*best.shape[:2], -1)
        return torch.cat([best, recent], dim=-1)


@dataclass(frozen=True)
class H2OMasked(_Rule):
    """H2O as its authors' simulation computes it: nothing is dropped, forgotten keys are masked and score no more.

    The window of recent tokens counts the *next* token already, so one key fewer than `recents` is in it, and the key
    before it is in neither set.
    """

    heavy: int = 64
    recents: int = 64
    scored = True
    bound = None

    def address(self, held: Held) -> list[Meeting]:
        return [Meeting(self._new(held, held.seen), held.position)]

    def visible(self, held: Held) -> Tensor | None:
        if held.old == 0:
            return None
        assert held.score is not None
        mask = self.mask(held.score[:, :, : held.old])
        if mask.shape[-1] < held.size:  # new tokens beyond the next one see each other
            mask = torch.nn.functional.pad(mask, (0, held.size - mask.shape[-1]), value=True)
        return mask[:, :, None]

    def mask(self, score: Tensor) -> Tensor:
        """[B, H, S + 1] which of S cached keys, and the next one, the next query sees."""
        size = score.shape[-1]
        seen = torch.ones(*score.shape[:2], size + 1, dtype=torch.bool, device=score.device)
        if size <= self.heavy + self.recents:
            return seen
        seen[..., : size + 1 - self.recents] = False
        return seen.scatter(-1, heavy(score[..., : size - self.recents], self.heavy), True)

    def score(self, score: Tensor, weights: Tensor) -> Tensor:
        return score + weights.sum(2)

    def keep(self, held: Held) -> None:
        """Drops nothing, but clears the statistic of what the next query will not see."""
        assert held.score is not None
        mask = self.mask(held.score)[..., :-1].clone()
        mask[..., max(0, held.size - self.recents) :] = True
        held.score.mul_(mask)
