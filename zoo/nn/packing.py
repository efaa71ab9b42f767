"""A padded batch as one row of documents, so that layers between attentions do no work on padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.nn.backbone import Backbone
from zoo.nn.kernels import shared
from zoo.nn.layout import Layout
from zoo.nn.masks import documents

_FLEX_FROM = 4096  # tokens from which one long row is worth it on GPU


@dataclass(frozen=True)
class Packed:
    """How a batch was packed.

    Attributes:
        place: [T] places of the kept tokens in the flattened batch.
        layout: of the packed row [1, T].
        batch, length: of the padded batch.
    """

    place: Tensor
    layout: Layout
    batch: int
    length: int

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [1, T, ...]"""
        return x.flatten(0, 1)[self.place][None]

    def put_back(self, y: Tensor) -> Tensor:
        """[1, T, ...] -> [B, L, ...] with zeros at padding."""
        flat = y.new_zeros(self.batch * self.length, *y.shape[2:])
        return flat.index_copy(0, self.place, y[0]).unflatten(0, (self.batch, self.length))


def pack(layout: Layout, backbone: Backbone, ids: Tensor) -> Packed | None:
    """Pack the valid tokens of ids [B, L]; None where that does not pay, or a layer could not part the documents.

    Documents of equal length stand side by side, so that attention takes them as one batch.
    """
    batch, length = ids.shape
    kept = layout.valid
    if kept is None or layout.kind not in ("causal", "full", "window") or torch.compiler.is_compiling():
        return None
    mixers: list[Any] = [layer.mixer for layer in backbone.layers]
    if not all(mixer.info.packing for mixer in mixers):
        return None
    if not (ids.device.type == "cpu" or batch * length >= _FLEX_FROM):
        return None
    place, lengths = documents(layout, batch, length, ids.device)
    if place is None:
        return None
    sizes = torch.tensor(lengths, device=ids.device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), sizes)[None]
    position = layout.position
    if position is not None:
        position = position.expand(batch, length, *position.shape[2:]).flatten(0, 1)[place][None]
    row = Layout(layout.kind, window=layout.window, sinks=layout.sinks, segment=segment, position=position)
    total = len(place)
    shared(row, ("documents", 1, total), lambda: (None, lengths))  # known: attention need not look for them
    return Packed(place, row, batch, length)
