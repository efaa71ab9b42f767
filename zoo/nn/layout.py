"""Who sees whom, and where each token stands: one object for every mask, lowered to whatever kernel serves it.

A mixer receives one `Layout` a call. It describes the *new* tokens of that call; what a carried state holds (keys,
history) lies before them. `allowed` is the definition, `dense` the oracle every fast path is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["causal", "full", "prefix", "block_causal", "window"]


@dataclass(frozen=True)
class Layout:
    """Visibility and positions of a batch of token sequences.

    Attributes:
        kind: `causal` (keys up to the query), `full` (all keys), `prefix` (the first `prefix` keys are seen by all,
            the rest causally), `block_causal` (keys of the same or an earlier `block`), `window` (keys within
            `window` of the query).
        prefix: length of the prefix, an int or [B].
        block: block index of each token, [L] or [B, L], non-decreasing.
        window: (left, right) numbers of keys seen beside the query's own, both inclusive; right 0 is causal.
        sinks: the first `sinks` keys stay visible to every later query (StreamingLLM), with kind `window`.
        valid: [B, L] bool, True for real tokens. Padding contributes to nothing and its outputs are 0.
        segment: [B, L] int, document index of packed sequences; tokens see only their own document.
        position: [B, L] or [B, L, axes], int or float; None counts the tokens (valid ones only, where `valid` is set).
        parent: [B, L] int for draft trees: index of each new token's parent among the new ones, -1 for the last
            committed token; a token then sees the committed past and its ancestors.
    """

    kind: Kind = "causal"
    prefix: int | Tensor | None = None
    block: Tensor | None = None
    window: tuple[int, int] | None = None
    sinks: int = 0
    valid: Tensor | None = None
    segment: Tensor | None = None
    position: Tensor | None = None
    parent: Tensor | None = None

    def with_(self, **changes: object) -> Layout:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def is_plain(self) -> bool:
        """True when kind alone says everything: no padding, packing, sinks or tree (positions do not count)."""
        return self.valid is None and self.segment is None and self.parent is None and not self.sinks

    @property
    def is_causal(self) -> bool:
        """True when no token can see a later one."""
        return self.kind == "causal" or (self.kind == "window" and self.window is not None and self.window[1] == 0)

    def positions(self, batch: int, length: int, device: torch.device, start: int | Tensor = 0) -> Tensor:
        """[B, L] (or [B, L, axes]) positions: the given ones, else a count of valid tokens from *start*."""
        if self.position is not None:
            return self.position
        if self.valid is not None:
            count = (self.valid.to(torch.long).cumsum(1) - 1).clamp_min(0)
        else:
            count = torch.arange(length, device=device).expand(batch, length)
        if self.segment is not None and self.valid is None:
            new = torch.ones_like(self.segment, dtype=torch.bool)
            new[:, 1:] = self.segment[:, 1:] != self.segment[:, :-1]
            first = torch.where(new, count, torch.zeros_like(count)).cummax(1).values
            count = count - first
        return count + (start[:, None] if isinstance(start, Tensor) else start)

    def ranks(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """[B, L] number of valid tokens of the own document before each token: what windows and sinks count in."""
        valid = torch.ones(batch, length, dtype=torch.long, device=device) if self.valid is None else self.valid.long()
        before = valid.cumsum(1) - valid
        if self.segment is None:
            return before
        segment = self.segment.expand(batch, length)
        new = torch.ones_like(segment, dtype=torch.bool)
        new[:, 1:] = segment[:, 1:] != segment[:, :-1]
        return before - torch.where(new, before, 0).cummax(1).values

    def dense(self, length: int, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """[B, L, L] bool, True where the query (row) sees the key (column). The oracle for every lowering; O(L²)."""
        index = torch.arange(length, device=device)
        q, k = index[:, None], index[None, :]
        seen = torch.ones(batch, length, length, dtype=torch.bool, device=device)
        if self.parent is not None:
            return self._tree(length, batch, device)
        if self.kind == "causal":
            seen = seen & (k <= q)
        elif self.kind == "prefix":
            if self.prefix is None:
                raise ValueError("a prefix layout needs `prefix`")
            edge = torch.as_tensor(self.prefix, device=device).reshape(-1, 1, 1)
            seen = seen & ((k <= q) | (k < edge))
        elif self.kind == "block_causal":
            if self.block is None:
                raise ValueError("a block_causal layout needs `block`")
            block = self.block.to(device).reshape(-1, length)
            seen = seen & (block[:, None, :] <= block[:, :, None])
        elif self.kind == "window":
            if self.window is None:
                raise ValueError("a window layout needs `window`")
            left, right = self.window
            place = self.ranks(batch, length, device)
            near = place[:, None, :] - place[:, :, None]
            near = (near >= -left) & (near <= right)
            seen = seen & (near | ((place[:, None, :] < self.sinks) & (k <= q)))
        if self.segment is not None:
            seen = seen & (self.segment[:, None, :] == self.segment[:, :, None])
        if self.valid is not None:
            seen = seen & self.valid[:, None, :] & self.valid[:, :, None]
        return seen

    def _tree(self, length: int, batch: int, device: torch.device | str) -> Tensor:
        assert self.parent is not None
        parent = self.parent.to(device).expand(batch, length)
        seen = torch.eye(length, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        for node in range(length):  # parents stand before their children
            up = parent[:, node].clamp_min(0)
            inherited = seen[torch.arange(batch, device=device), up]
            seen[:, node] |= inherited & (parent[:, node] >= 0)[:, None]
        return seen


CAUSAL = Layout("causal")
FULL = Layout("full")
