"""Who sees whom when new tokens continue a cache: the layout's rule, written in the places and positions of the cache.

Places count the tokens of a row; a draft's tokens have places after one another but stand at their depth in the tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.kernels import Slopes, shared
from zoo.nn.layout import Layout


@dataclass
class Continuation:
    """New tokens after a cache.

    Attributes:
        layout: of the new tokens.
        before: tokens in the cache, an int or [B].
        slots: [B or 1, n] places of the new tokens.
        total: keys that are attended to.
        position: [B or 1, total] positions of those keys, -1 for none, where the cache is a ring; the new ones are
            the last. None for a full cache, whose key j is token j.
        batch: B.
    """

    layout: Layout
    before: int | Tensor
    slots: Tensor
    total: int
    batch: int
    position: Tensor | None = None

    @property
    def new(self) -> int:
        return self.slots.shape[1]

    @cached_property
    def start(self) -> Any:
        return column(self.before)

    @cached_property
    def where(self) -> Tensor:
        """[B or 1, n] positions of the new tokens."""
        if self.layout.parent is None:
            return self.slots
        return depth(self.layout, self.batch, self.new, self.slots.device) + self.start

    @cached_property
    def keys(self) -> Tensor:
        """[B or 1, total] places of the keys, or their positions on a ring."""
        if self.position is not None:
            return self.position
        return torch.arange(self.total, device=self.slots.device)[None]

    @cached_property
    def key_position(self) -> Tensor:
        """[B or 1, total] positions of the keys."""
        if self.layout.parent is None or self.position is not None:
            return self.keys
        inside = self.keys - self.start
        draft = (inside >= 0) & (inside < self.new)
        rows = max(len(self.where), len(draft))
        deep = self.where.expand(rows, -1).gather(1, inside.clamp(0, self.new - 1).expand(rows, -1))
        return torch.where(draft.expand(rows, -1), deep, self.keys.expand(rows, -1))

    def mask(self, window: int | None, sinks: int, slopes: Slopes | None, dtype: torch.dtype) -> Tensor | None:
        """[B or 1, H or 1, n, total], bool or (with ALiBi) a bias in *dtype*; None where every token sees every key.

        *window* and *sinks* are the mixer's own, beside the layout's.
        """
        kind, uniform = self.layout.kind, isinstance(self.before, int)
        whole = kind == "full" or (kind == "causal" and self.new == 1)
        if whole and uniform and self.position is self.layout.parent is window is slopes is None:
            return None
        return shared(
            self.layout,
            ("mask", slopes, window, sinks, self.new, self.total, dtype, self.before if uniform else None),
            lambda: self.bias(slopes, self._near(self._seen(), window, sinks), dtype),
            None if uniform else self.before,
            self.position,
        )

    def bias(self, slopes: Slopes | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
        """*seen* [B or 1, n, total] as a mask, with ALiBi where slopes are given."""
        if slopes is None:
            assert seen is not None
            return seen[:, None]
        slope = torch.tensor(slopes, device=self.where.device, dtype=torch.float32)[:, None, None]
        bias = -slope * (self.where[:, None, :, None] - self.key_position[:, None, None, :]).abs()
        return (bias if seen is None else bias.masked_fill(~seen[:, None], -math.inf)).to(dtype)

    def _near(self, seen: Tensor, window: int | None, sinks: int) -> Tensor:
        if window is None:
            return seen
        key, at = self.key_position[:, None], self.where[..., None]
        near = (key >= at - window) & (key <= at + window)
        return seen & (near | ((key < sinks) & (key <= at)))

    def _seen(self) -> Tensor:
        if self.layout.parent is not None or self.layout.block is not None:
            return self._by_dense()
        layout, k = self.layout, self.keys[:, None, :]
        q = self.slots[..., None]
        end = q[:, -1:] + 1
        if layout.valid is not None:
            end = (self.start + layout.valid.sum(1, keepdim=True))[..., None]
        seen = ((k < end) & (k >= 0)).expand(-1, self.new, -1)
        if layout.kind in ("causal", "window"):
            right = layout.window[1] if layout.kind == "window" and layout.window else 0
            seen = seen & (k <= q + right)
        elif layout.kind == "prefix":
            edge = torch.as_tensor(layout.prefix, device=k.device).reshape(-1, 1, 1)
            seen = seen & ((k <= q) | (k < edge))
        if layout.kind == "window" and layout.window is not None:
            seen = seen & ((k >= q - layout.window[0]) | (k < layout.sinks))
        if self.position is not None and layout.valid is not None:
            # padded tokens lie among the new ones and share a position with the one before
            real = layout.valid[:, None, :]
            old = real.new_ones(len(real), 1, self.total - self.new)
            seen = seen & torch.cat([old, real], dim=2)
        return seen

    def _by_dense(self) -> Tensor:
        """Drafts and blocks: all of the cache, and of the new tokens those that the layout's own definition gives."""
        if self.layout.valid is not None:
            raise ZooError("drafts and block-causal tokens cannot continue a state with padding among them")
        among = self.layout.dense(self.new, self.batch, self.keys.device)
        if self.position is not None:
            old = (self.position[:, : self.total - self.new] >= 0)[:, None]
            rows = max(len(among), len(old))
            return torch.cat([old.expand(rows, self.new, -1), among.expand(rows, -1, -1)], dim=2)
        inside = self.keys - self.start
        rows = max(len(among), len(inside))
        index = inside.clamp(0, self.new - 1)[:, None].expand(rows, self.new, -1)
        fresh = among.expand(rows, -1, -1).gather(2, index)
        return (inside < 0)[:, None] | (fresh & ((inside >= 0) & (inside < self.new))[:, None])


def column(value: int | Tensor) -> Any:
    """[B] -> [B, 1]; an int stays."""
    return value[:, None] if isinstance(value, Tensor) else value


def depth(layout: Layout, batch: int, length: int, device: torch.device) -> Tensor:
    """[B or 1, n] generations of a draft's tokens below the last committed token, from 0."""

    def build() -> Tensor:
        assert layout.parent is not None
        parent = layout.parent.to(device)
        parent = parent[None] if parent.ndim == 1 else parent
        deep = torch.zeros_like(parent)
        for node in range(length):  # parents stand before their children
            up = parent[:, node]
            above = deep.gather(1, up.clamp_min(0)[:, None])[:, 0]
            deep[:, node] = torch.where(up >= 0, above + 1, 0)
        return deep

    return shared(layout, ("depth", length), build)
