"""Keys and values of consumed tokens: a preallocated cache, and a ring of the last ones with kept first ones (sinks).

Rows of a batch may hold different numbers of tokens: each is stored left-aligned in its own row, without padding.
While all rows agree the length is a Python int and nothing but slices is touched; it becomes a tensor [B] when a
padded prompt or a draft makes them differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.state import State

Length = int | Tensor


@dataclass
class KVState(State):
    """Full cache.

    Attributes:
        k: [B, H_k, capacity, d_k].
        v: [B, H_v, capacity, d_v].
        length: tokens held by each row, an int or [B].
        base: `length` before the last call, from which `commit` counts.
        longest: the largest length, kept beside the tensor so that reading it costs no synchronisation.
    """

    k: Tensor
    v: Tensor
    length: Length = 0
    base: Length = 0
    longest: int = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def slots(self, new: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """[B or 1, new] places of the next tokens; that of a padded one is the place of the token before it."""
        steps = torch.arange(new, device=device)[None] if valid is None else (valid.long().cumsum(1) - 1).clamp_min(0)
        return steps + (self.length[:, None] if isinstance(self.length, Tensor) else self.length)

    def append(self, k: Tensor, v: Tensor, slots: Tensor, valid: Tensor | None, count: Tensor | None) -> None:
        """Store k [B, n, H_k, d_k] and v [B, n, H_v, d_v] at *slots*, without the padded ones; *count* [B] are valid.

        Raises:
            ZooError: more tokens than the capacity.
        """
        new = k.shape[1]
        longest = self.longest + new
        if count is not None:
            longest = int((self.length + count).max())
        if longest > self.capacity:
            raise ZooError(
                f"the cache holds at most {self.capacity} tokens (max_len of init_state), but {longest} were put in"
            )
        if torch.is_grad_enabled() and k.requires_grad:  # autograd still needs the old values
            self.k, self.v = self.k.clone(), self.v.clone()
        if isinstance(self.length, int) and count is None:
            self.k[:, :, self.length : longest] = k.transpose(1, 2)
            self.v[:, :, self.length : longest] = v.transpose(1, 2)
        else:
            store(self.k, k, slots, valid)
            store(self.v, v, slots, valid)
        self.longest = longest

    def advance(self, by: Length) -> None:
        """Count the tokens stored by `append`."""
        self.base = self.length
        self.length = self.length + by

    def commit(self, path: Tensor) -> Self:
        """Keep, of the tokens of the last call, those on *path* [B, n] in that order; -1 pads shorter paths."""
        chosen = path.to(self.k.device)
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        base = self.base[:, None] if isinstance(self.base, Tensor) else self.base
        source = base + chosen.clamp_min(0)
        target = base + torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        keep = chosen >= 0
        for cache in (self.k, self.v):
            kept = cache[rows, :, source]  # [B, n, H, d]
            cache[rows.expand_as(target)[keep], :, target[keep]] = kept[keep]
        count = keep.sum(1)
        if bool((count == count[0]).all()) and isinstance(self.base, int):
            self.length = self.longest = self.base + int(count[0])
        else:
            self.length = self.base + count
            self.longest = int(self.length.max())
        self.base = self.length
        return self


@dataclass
class RingState(State):
    """The last tokens on a ring, after the first `sinks` which stay (sliding window, StreamingLLM's sinks).

    Place s < sinks holds token s; the others hold, at sinks + (p - sinks) mod (capacity - sinks), the latest token p.
    Tokens of a draft tree wait in `pending_k` and `pending_v` until `commit` says which of them stay.
    """

    k: Tensor
    v: Tensor
    sinks: int
    length: Length = 0
    pending_k: Tensor | None = None
    pending_v: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def slots(self, new: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """[B or 1, new] positions of the next tokens in their sequences."""
        steps = torch.arange(new, device=device)[None] if valid is None else (valid.long().cumsum(1) - 1).clamp_min(0)
        return steps + (self.length[:, None] if isinstance(self.length, Tensor) else self.length)

    def held(self) -> Tensor:
        """[B or 1, capacity] position of the token in each place, -1 where there is none."""
        place = torch.arange(self.capacity, device=self.k.device)[None]
        last = (self.length[:, None] if isinstance(self.length, Tensor) else self.length) - 1
        ring = last - (last - place) % (self.capacity - self.sinks)
        held = torch.where(place < self.sinks, place, ring)
        return torch.where((held <= last) & ((place < self.sinks) | (ring >= self.sinks)), held, -1)

    def append(self, k: Tensor, v: Tensor, position: Tensor, valid: Tensor | None, count: Tensor | None) -> None:
        """Store k [B, n, H_k, d_k] and v [B, n, H_v, d_v] of tokens at *position* [B or 1, n]; the oldest go."""
        if torch.is_grad_enabled() and k.requires_grad:  # autograd still needs the old values
            self.k, self.v = self.k.clone(), self.v.clone()
        ring = self.capacity - self.sinks
        end = self.length + (k.shape[1] if count is None else count)
        end = end[:, None] if isinstance(end, Tensor) else end
        stays = (position < self.sinks) | (position >= end - ring)
        place = torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % ring)
        keep = stays.expand(len(k), -1) if valid is None else stays & valid
        store(self.k, k, place, keep)
        store(self.v, v, place, keep)

    def advance(self, by: Length) -> None:
        """Count the tokens stored by `append`."""
        self.length = self.length + by

    def commit(self, path: Tensor) -> Self:
        """Keep, of the draft tokens of the last call, those on *path* [B, n] in that order; -1 pads shorter paths.

        Raises:
            ZooError: the last call was no draft: a ring has dropped what those tokens displaced.
        """
        if self.pending_k is None or self.pending_v is None:
            raise ZooError("a window cache takes back only drafts, calls whose layout has `parent`")
        chosen = path.to(self.k.device)
        keep = chosen >= 0
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        k, v = self.pending_k[rows, chosen.clamp_min(0)], self.pending_v[rows, chosen.clamp_min(0)]
        count = keep.sum(1)
        uniform = isinstance(self.length, int) and bool((count == count[0]).all())
        position = self.slots(chosen.shape[1], keep, chosen.device)
        self.append(k, v, position, keep, count)
        self.advance(int(count[0]) if uniform else count)
        self.pending_k = self.pending_v = None
        return self


def store(cache: Tensor, new: Tensor, place: Tensor, keep: Tensor | None) -> None:
    """Write new [B, n, H, d] into cache [B, H, capacity, d] at place [B or 1, n], where keep [B, n] allows."""
    new = new.to(cache.dtype)
    rows = torch.arange(len(new), device=cache.device)[:, None].expand(new.shape[:2])
    place = place.expand(new.shape[:2])
    if keep is None:
        cache[rows, :, place] = new
    else:
        cache[rows[keep], :, place[keep]] = new[keep]
