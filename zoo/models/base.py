"""What every token-sequence model shares: embed, backbone, head, and the verbs tasks and generation call."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.backbone import Backbone
from zoo.nn.heads import Head, HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mixer import ParamGroup, split_param_groups
from zoo.nn.state import State


class SequenceModel(nn.Module):
    """Base of models over token ids. A subclass sets `config`, `embed`, `backbone` and `head` in its constructor.

    Attributes:
        layout_kind: layout of a plain call.
        max_len: longest input in tokens, None when unbounded.
    """

    layout_kind: str = "causal"
    config: Any
    embed: nn.Embedding
    backbone: Backbone
    head: Head
    max_len: int | None = None

    def embed_tokens(self, ids: Tensor, layout: Layout) -> Tensor:
        """Token ids [B, L] -> [B, L, D]."""
        return self.embed(ids)

    def forward_features(
        self, ids: Tensor, layout: Layout | None = None, state: Any = None
    ) -> tuple[Tensor, State | None]:
        """ids [B, L] -> (hidden [B, L, D] after the final norm, state). A state is continued (chunked prefill).

        Raises:
            ZooError: more tokens than max_len.
        """
        self.check_length(ids.shape[1])
        layout = Layout(self.layout_kind) if layout is None else layout  # type: ignore[arg-type]
        return self.backbone(self.embed_tokens(ids, layout), layout, state)

    def check_length(self, length: int) -> None:
        """Raise ZooError when *length* tokens are more than max_len."""
        if self.max_len is not None and length > self.max_len:
            raise ZooError(
                f"the input has {length} tokens but this model takes at most {self.max_len} (max_len): "
                "split it or take a model with a longer context"
            )

    def forward_head(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] -> [B, L, V], [B, num_outputs] or [B, L, num_outputs] by the head's kind."""
        return self.head(hidden, valid, self.embed.weight)

    def forward(self, ids: Tensor, valid: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
        """Logits of ids [B, L]; valid [B, L] is True for real tokens, None when all are.

        Rows may hold several documents, which segment [B, L] numbers: they do not see each other.
        """
        layout = Layout(self.layout_kind, valid=valid, segment=segment)  # type: ignore[arg-type]
        return self.forward_head(self.forward_features(ids, layout)[0], valid)

    def init_state(
        self,
        batch: int,
        max_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """Empty decoding state for *batch* sequences of at most *max_len* tokens (the model's own by default).

        Raises:
            ZooError: the model cannot be that long, or a mixer cannot decode token by token.
        """
        if self.max_len is not None and (max_len or 0) > self.max_len:
            raise ZooError(f"cannot decode {max_len} tokens: this model takes at most {self.max_len} (max_len)")
        return self.backbone.init_state(batch, max_len or self.max_len or 2048, device, dtype)

    @property
    def head_kind(self) -> str:
        return self.head.config.kind

    def reset_head(self, num_outputs: int, kind: str = "sequence", pooling: str = "last", **options: Any) -> None:
        """Replace the head by a fresh one; *options* are further HeadConfig fields. The config follows.

        An `lm` head is untied after this, since the pretrained embedding is not to be trained through it.
        """
        head = HeadConfig(
            kind=kind,  # type: ignore[arg-type]
            num_outputs=num_outputs,
            pooling=pooling,  # type: ignore[arg-type]
            **{"tied": False, **options},
        )
        self.config = dataclasses.replace(self.config, head=head)
        like = self.embed.weight
        self.head = Head(head, like.shape[1], like.shape[0]).to(device=like.device, dtype=like.dtype)

    def param_groups(self) -> list[ParamGroup]:
        """All trainable parameters with their optimiser settings."""
        return split_param_groups(self)

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.backbone.grad_checkpointing = on
