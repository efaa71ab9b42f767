"""Key-value caches that forget, and the protocol of the rules by which they do.

A rule says three things: which cached tokens stay after a pass (`keep`), which of them a query may attend to
(`visible`), and at which angles queries and keys meet (`address`): the true positions, the places inside the cache, or
clamped distances. Keys are therefore cached before rotation, and turned by the angles of each pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.kernels import lift_heads
from zoo.nn.kv import KVState, RingState
from zoo.nn.layout import Layout
from zoo.nn.positions import rotary, rotate
from zoo.nn.state import Stack, State

_ROWS = 256  # queries whose weights over all keys exist at once


@dataclass(frozen=True)
class Held:
    """What a rule sees of a cache during a pass.

    Attributes:
        position: [B, H, S] place in the sequence of every cached token, those of this pass last.
        score: [B, H, S] running statistic of `score`; None where the rule keeps none.
        old: cached tokens from before this pass.
        seen: tokens consumed before this pass, forgotten ones included.
    """

    position: Tensor
    score: Tensor | None
    old: int
    seen: int

    @property
    def size(self) -> int:
        return self.position.shape[-1]

    @property
    def new(self) -> int:
        return self.size - self.old


@dataclass(frozen=True)
class Meeting:
    """Angle positions at which queries meet keys: queries [n], keys [S] or [B, H, S]; `where` [B or 1, H or 1, n, S]
    says for which pairs (all, if None)."""

    query: Tensor
    key: Tensor
    where: Tensor | None = None


class CachePolicy(Protocol):
    """A rule. Objects are frozen: what changes lives in the state.

    Attributes:
        scored: the rule wants attention weights summed into `Held.score`.
        bound: most tokens cached between passes, None for all.
    """

    scored: bool

    @property
    def bound(self) -> int | None:
        """Most tokens cached between passes."""

    def visible(self, held: Held) -> Tensor | None:
        """[B or 1, H or 1, n, S] bool: keys that the queries of this pass may attend to; None for all."""

    def address(self, held: Held) -> list[Meeting]:
        """How queries and keys meet; of several meetings the last one that holds for a pair counts."""

    def score(self, score: Tensor, weights: Tensor) -> Tensor:
        """The statistic [B, H, S] after weights [B, H, n, S] were paid, summed over each group's query heads."""

    def keep(self, held: Held) -> Tensor | None:
        """[1 or B, 1 or H, m] indices of the cached tokens that stay, ascending; None for all."""


@dataclass
class PolicyState(State):
    """A cache under a rule. All rows hold equally many tokens.

    Attributes:
        k, v: [B, H, capacity, d], keys before rotation.
        position: [B, H, capacity].
        score: [B, H, capacity] or None.
        policy: the rule.
        length: cached tokens.
        seen: tokens consumed.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    score: Tensor | None
    policy: Any
    length: int = 0
    seen: int = 0

    def view(self, new: int = 0) -> Held:
        """What the rule sees when the last *new* of the cached tokens belong to this pass."""
        score = None if self.score is None else self.score[:, :, : self.length]
        return Held(self.position[:, :, : self.length], score, self.length - new, self.seen - new)

    def attend(self, mixer: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Store k, v [B, n, H, d] of new tokens, attend from q [B, n, H_q, d] and forget: [B, n, H_q, d_v].

        Raises:
            ZooError: padding or drafts, which caches that forget do not take; keys of another width than the queries'.
        """
        if layout.valid is not None or layout.parent is not None:
            raise ZooError("a cache policy takes neither padding nor drafts: decode each sequence as its own batch")
        if mixer.k_lift is not None:
            raise ZooError("a cache policy does not serve compressed keys (k_dim)")
        n = q.shape[1]
        self._put(k, v)
        held = self.view(n)
        y = self._weigh(mixer, q, held)
        kept = self.policy.keep(self.view(n))
        if kept is not None:
            self._forget(kept)
        return y

    def _put(self, k: Tensor, v: Tensor) -> None:
        n, end = k.shape[1], self.length + k.shape[1]
        if end > self.k.shape[2]:
            self._resize(end)
        self.k[:, :, self.length : end] = k.transpose(1, 2)
        self.v[:, :, self.length : end] = v.transpose(1, 2)
        self.position[:, :, self.length : end] = torch.arange(self.seen, self.seen + n, device=k.device)
        if self.score is not None:
            self.score[:, :, self.length : end] = 0
        self.length, self.seen = end, self.seen + n

    def _resize(self, capacity: int) -> None:
        def moved(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            size = min(self.length, capacity)
            new[:, :, :size] = old[:, :, :size]
            return new

        self.k, self.v, self.position = moved(self.k), moved(self.v), moved(self.position)
        self.score = None if self.score is None else moved(self.score)

    def _forget(self, kept: Tensor) -> None:
        batch, heads = self.k.shape[:2]
        index = kept.expand(batch, heads, -1)
        size = index.shape[-1]

        def stay(old: Tensor) -> None:
            wide = index if old.ndim == 3 else index[..., None].expand(-1, -1, -1, old.shape[3])
            old[:, :, :size] = old.gather(2, wide)

        for tensor in (self.k, self.v, self.position, *(() if self.score is None else (self.score,))):
            stay(tensor)
        self.length = size
        bound = self.policy.bound
        if bound is not None and self.k.shape[2] > 2 * (bound + 1):  # a long prompt has passed
            self._resize(bound + 1)

    def _weigh(self, mixer: Any, q: Tensor, held: Held) -> Tensor:
        n, heads = q.shape[1:3]
        groups = self.k.shape[1]
        per = heads // groups
        k, v = self.k[:, :, : self.length].to(q.dtype), self.v[:, :, : self.length].to(q.dtype)
        if v.shape[1] != groups:
            v = lift_heads(v, groups)
        q = q.transpose(1, 2).unflatten(1, (groups, per))  # [B, G, R, n, d]
        visible, meetings = self.policy.visible(held), self.policy.address(held)
        keys = [self._turn(mixer, k, meeting.key) for meeting in meetings]
        slot = torch.arange(held.size, device=q.device)
        parts = []
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            logits = None
            for meeting, key in zip(meetings, keys, strict=True):
                turned = self._turn(mixer, q[:, :, :, rows], meeting.query[rows])
                z = turned @ key[:, :, None].transpose(-1, -2) * mixer.scale  # [B, G, R, n, S]
                if mixer.slopes is not None:
                    z = z - self._slope(mixer, meeting, rows, groups, per).to(z.dtype)
                if logits is None or meeting.where is None:
                    logits = z
                else:
                    logits = torch.where(meeting.where[:, :, rows][:, :, None], z, logits)
            assert logits is not None
            seen = (slot <= held.old + torch.arange(n, device=q.device)[rows, None])[None, None]
            if visible is not None:
                seen = seen & visible[:, :, rows]
            weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
            if held.score is not None:
                assert self.score is not None
                paid = self.policy.score(held.score, weights.sum(2))
                self.score[:, :, : self.length] = paid
                held = Held(held.position, paid, held.old, held.seen)
            parts.append(weights @ v[:, :, None])
        y = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
        return y.flatten(1, 2).transpose(1, 2)

    def _turn(self, mixer: Any, x: Tensor, position: Tensor) -> Tensor:
        """x [B, G, ..., S, d] turned to *position* [S] or [B, G, S]."""
        rope = mixer.config.rope
        if rope is None:
            return x
        cos, sin = rotary(rope, mixer.rotary_dim, position)
        return rotate(x[..., None, :], cos, sin, rope.interleaved)[..., 0, :]

    def _slope(self, mixer: Any, meeting: Meeting, rows: slice, groups: int, per: int) -> Tensor:
        """ALiBi's penalty [1 or B, G, R, n, S]."""
        key = meeting.key if meeting.key.ndim == 3 else meeting.key[None, None]
        distance = (meeting.query[rows][:, None] - key[:, :, None]).abs()  # [B or 1, G or 1, n, S]
        slopes = torch.tensor(mixer.slopes, device=key.device).view(groups, per, 1, 1)
        return slopes * distance[:, :, None]


def managed(state: Any, policy: CachePolicy) -> Any:
    """*state*, fresh from `init_state`, with every full cache under the rule *policy*.

    Raises:
        ZooError: no layer has a cache.
    """
    if not isinstance(state, Stack) or not any(isinstance(layer, KVState) for layer in state.layers):
        raise ZooError("a cache policy needs attention layers with a full cache, and this model has none")
    return Stack([_managed(layer, policy) if isinstance(layer, KVState) else layer for layer in state.layers])


def _managed(layer: KVState | RingState, policy: CachePolicy) -> PolicyState:
    batch, heads = layer.k.shape[:2]
    room = layer.k.shape[2] if policy.bound is None else min(layer.k.shape[2], policy.bound + 1)
    k, v = layer.k[:, :, :room].contiguous(), layer.v[:, :, :room].contiguous()
    position = torch.zeros(batch, heads, room, dtype=torch.long, device=k.device)
    score = torch.zeros(batch, heads, room, dtype=torch.float32, device=k.device) if policy.scored else None
    return PolicyState(k, v, position, score, policy)
