"""Output heads of sequence models, and how a sequence of hidden states becomes one vector."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config


@config
class HeadConfig:
    """What a model predicts.

    Attributes:
        kind: `lm` (a distribution over the vocabulary at every position), `token` (num_outputs at every position) or
            `sequence` (num_outputs for the whole sequence).
        num_outputs: classes or targets of the `token` and `sequence` kinds.
        pooling: what a `sequence` head reads: the `last`, the `first` or the `mean` of the valid positions. Official
            rules that ignore or misread padding: `mean_all` and `sum_all` take all positions, pads included
            (HyenaDNA's standalone code); `mean_prefix` takes the first n positions where n is the number of valid
            ones (its SequenceDecoder with a mask, right for right padding only); `before_pad` the position before
            the first pad, or the last of all where there is none or the row starts with one (its Hugging Face port).
        bias: bias of the output layer of the `token` and `sequence` kinds; an `lm` head has none.
        slots: places inside a token that a `token` head tells apart, num_outputs for each: k for k-mers, so that every
            base gets an output of its own.
        dropout: before the output layer.
        tied: an `lm` head uses the token embedding as its weight.
    """

    kind: Literal["lm", "token", "sequence"] = "lm"
    num_outputs: int = 0
    slots: int = 1
    pooling: Literal["last", "mean", "first", "mean_all", "sum_all", "mean_prefix", "before_pad"] = "last"
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        if self.kind != "lm" and self.num_outputs < 1:
            raise ValueError(f"a '{self.kind}' head needs num_outputs of at least 1, got {self.num_outputs}")
        if self.slots != 1 and (self.kind != "token" or self.slots < 1):
            raise ValueError(f"slots are for 'token' heads and at least 1, got {self.slots} for '{self.kind}'")


class Head(nn.Module):
    """Linear output layer, with pooling before it for the `sequence` kind."""

    def __init__(self, config: HeadConfig, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        lm = config.kind == "lm"
        if not (lm and config.tied):
            outputs = vocab_size if lm else config.num_outputs * config.slots
            self.weight = nn.Parameter(torch.empty(outputs, d_model))
            if config.bias and not lm:
                self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from N(0, std^2); zero bias."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """hidden [B, L, D] -> [B, L, V], [B, L, num_outputs] or [B, num_outputs]; *embedding* [V, D] where tied.

        With several slots [B, L, slots, num_outputs].
        """
        if self.config.kind == "sequence":
            hidden = pool(hidden, valid, self.config.pooling)
        weight = embedding if self.weight is None else self.weight
        assert weight is not None
        y = F.linear(self.dropout(hidden), weight, self.bias)
        return y if self.config.slots == 1 else y.unflatten(-1, (self.config.slots, self.config.num_outputs))


def pool(hidden: Tensor, valid: Tensor | None, mode: str) -> Tensor:
    """Reduce hidden [B, L, D] to [B, D] by one of HeadConfig's pooling rules; valid [B, L] marks real tokens."""
    if mode == "mean_all" or (valid is None and mode in ("mean", "mean_prefix")):
        return hidden.mean(1)
    if mode == "sum_all":
        return hidden.sum(1)
    if valid is None:
        return hidden[:, 0] if mode == "first" else hidden[:, -1]
    if mode == "mean":
        kept = hidden.masked_fill(~valid[..., None], 0)
        return kept.sum(1) / valid.sum(1, keepdim=True).clamp_min(1).to(hidden.dtype)
    position = torch.arange(hidden.shape[1], device=hidden.device)
    if mode == "mean_prefix":
        count = valid.sum(1, keepdim=True)
        kept = hidden.masked_fill((position >= count)[..., None], 0)
        return kept.sum(1) / count.clamp_min(1).to(hidden.dtype)
    if mode == "before_pad":
        index = ((~valid).int().argmax(1) - 1) % hidden.shape[1]
    elif mode == "first":
        index = valid.int().argmax(1)
    else:  # the last valid position; a row without any takes position 0
        index = torch.where(valid, position, 0).amax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
