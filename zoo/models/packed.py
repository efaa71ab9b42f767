"""Models that do no work on padding: a padded batch runs through the layers as one row of its documents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.models.base import SequenceModel
from zoo.nn.layout import Layout
from zoo.nn.packing import pack


class PackedModel(SequenceModel):
    """A SequenceModel whose padded batches are packed where that pays; hidden states at padding are 0 either way."""

    def forward_features(self, ids: Tensor, layout: Layout | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """ids [B, L] -> (hidden [B, L, D] after the final norm, 0 at padding; state)."""
        if layout is None or layout.valid is None or state is not None:
            return super().forward_features(ids, layout, state)
        self.check_length(ids.shape[1])
        packed = pack(layout, self.backbone, ids)
        if packed is None:
            hidden, _ = super().forward_features(ids, layout)
            return hidden.masked_fill(~layout.valid[..., None], 0), None
        row = packed.take(ids)
        hidden, _ = self.backbone(self.embed_tokens(row, packed.layout), packed.layout)
        return packed.put_back(hidden), None
