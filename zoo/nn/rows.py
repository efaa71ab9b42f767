"""Padding and packing, solved once: every document becomes a row of its own, left-aligned.

A convolution or a recurrence with fixed coefficients cannot skip a padded position or forget at a document's border
in the middle of its sequence. So the tokens of each document are gathered into a row, the rows are mixed as plain
right-padded sequences, and the results are scattered back; padded positions get 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.layout import Layout
from zoo.nn.mixer import Mixer


@dataclass(frozen=True)
class Rows:
    """Where the tokens of each row stand in the batch.

    Attributes:
        index: [R, T] positions in the flattened [B·L] batch; unused places hold 0.
        keep: [R, T] bool, True for the places in use: the first `count` of each row.
        count: [R] tokens of each row.
        batch: B.
        length: L.
    """

    index: Tensor
    keep: Tensor
    count: Tensor
    batch: int
    length: int

    @staticmethod
    def of(layout: Layout, batch: int, length: int, device: torch.device) -> Rows:
        """The rows of a layout: one per sequence, or one per packed document where `segment` is set."""
        valid = layout.valid
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        if layout.segment is None:
            order = torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True)
            count = valid.sum(1)
            keep = torch.arange(length, device=device) < count[:, None]
            index = order + torch.arange(batch, device=device)[:, None] * length
            return Rows(index.masked_fill(~keep, 0), keep, count, batch, length)
        segment = layout.segment.expand(batch, length)
        low = segment.min()
        key = segment - low + torch.arange(batch, device=device)[:, None] * (segment.max() - low + 1)
        place = valid.reshape(-1).nonzero()[:, 0]
        _, row, count = torch.unique(key.reshape(-1)[place], return_inverse=True, return_counts=True)
        order = torch.argsort(row, stable=True)
        rank = torch.arange(len(order), device=device) - (count.cumsum(0) - count)[row[order]]
        longest = int(count.max()) if len(count) else 0
        index = torch.zeros(len(count), longest, dtype=torch.long, device=device)
        index[row[order], rank] = place[order]
        keep = torch.arange(longest, device=device) < count[:, None]
        return Rows(index, keep, count, batch, length)

    def gather(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [R, T, ...] with zeros beyond each row's count."""
        flat = x.reshape(self.batch * self.length, *x.shape[2:])
        rows = flat[self.index.reshape(-1)].view(*self.index.shape, *x.shape[2:])
        return rows.masked_fill(~self.keep.view(*self.keep.shape, *[1] * (x.ndim - 2)), 0)

    def scatter(self, y: Tensor) -> Tensor:
        """[R, T, ...] -> [B, L, ...] with zeros where no row has a token."""
        kept = self.keep.reshape(-1)
        flat = y.new_zeros(self.batch * self.length, *y.shape[2:])
        flat = flat.index_copy(0, self.index.reshape(-1)[kept], y.reshape(-1, *y.shape[2:])[kept])
        return flat.view(self.batch, self.length, *y.shape[2:])


class RowMixer(Mixer):
    """A mixer that knows only left-aligned rows: subclasses implement `mix` and get padding and packing from here."""

    def mix(self, x: Tensor, count: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Mix rows x [R, T, D] of which the first `count` [R] places are real (all, if None); x is 0 elsewhere.

        Whatever is put out at the other places is ignored, but they must leave no trace in the state.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, layout: Layout, state: Any = None) -> tuple[Tensor, Any]:
        """Mix x [B, L, D] along L.

        Raises:
            ZooError: packed documents together with a carried state.
        """
        if layout.valid is None and layout.segment is None:
            return self.mix(x, None, state)
        if layout.segment is not None and state is not None:
            raise ZooError(
                f"{type(self).__name__} got packed documents (Layout.segment) and a carried state; "
                "prefill each document as its own row of the batch"
            )
        rows = Rows.of(layout, x.shape[0], x.shape[1], x.device)
        y, state = self.mix(rows.gather(x), rows.count, state)
        return rows.scatter(y), state


def right_align(u: Tensor, count: Tensor | None) -> Tensor:
    """Shift each row of u [R, ..., T] so that its first `count` [R] places come last; zeros before them."""
    if count is None:
        return u
    source = torch.arange(u.shape[-1], device=u.device) - (u.shape[-1] - count)[:, None]  # [R, T]
    source = source.view(len(count), *[1] * (u.ndim - 2), u.shape[-1])
    return u.gather(-1, source.clamp_min(0).expand_as(u)).masked_fill(source < 0, 0)


def row_mask(x: Tensor, count: Tensor | None) -> Tensor:
    """x [R, T, ...] with zeros at the places beyond `count`."""
    if count is None:
        return x
    keep = torch.arange(x.shape[1], device=x.device) < count[:, None]
    return x * keep.view(*keep.shape, *[1] * (x.ndim - 2)).to(x.dtype)


def row_tail(x: Tensor, history: Tensor, count: Tensor | None) -> Tensor:
    """The last n inputs of each row after x [R, T, C], given the n before it, history [R, n, C]."""
    joined = torch.cat([history, x.to(history.dtype)], dim=1)
    size = history.shape[1]
    if count is None:
        return joined[:, x.shape[1] :]
    index = count[:, None] + torch.arange(size, device=x.device)  # [R, n]
    return joined.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
