"""DNABERT-2: a masked language model over BPE tokens of many genomes.

Zhou et al. 2023, "DNABERT-2: Efficient Foundation Model and Benchmark for Multi-Species Genome", arXiv:2306.15006.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import config
from zoo.models.encoder import Encoder, EncoderConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import Layout


@config
class DNABERT2Config(EncoderConfig):
    """Sizes of DNABERT-2 117M, which are the defaults. Other fields: see EncoderConfig.

    Attributes:
        padding_idx: the token whose embedding gets no gradient. None with the published config class; 0 (which is
            [UNK], not [PAD] = 3) with the transformers BertConfig that its README recommends.
    """

    padding_idx: int | None = None
    head: HeadConfig = field(default_factory=HeadConfig)


class DNABERT2(Encoder):
    """An encoder over BPE tokens. Hidden states at padding are 0, as in the published code.

    Distances count valid tokens: a hole in the middle of `valid` closes up, where the published code would keep its
    width. Padding at the ends is no hole, and tokenizers make no others.
    """

    Config = DNABERT2Config
    config: DNABERT2Config

    def __init__(self, config: DNABERT2Config) -> None:
        super().__init__(config)
        self.embed.padding_idx = config.padding_idx
        if config.padding_idx is not None:
            with torch.no_grad():
                self.embed.weight[config.padding_idx] = 0


def masked_lm_loss(logits: Tensor, labels: Tensor, official: bool = False) -> Tensor:
    """Cross-entropy of logits [B, L, V] at the masked positions of labels [B, L], -100 elsewhere.

    Args:
        official: only labels above 0 count, so that a masked [UNK] (id 0) is never learned, as in the published code.
    """
    keep = labels > 0 if official else labels >= 0
    return F.cross_entropy(logits[keep].float(), labels[keep])


def masked_logits(model: DNABERT2, ids: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """[N, V] logits at the positions with labels above 0 alone, in row-major order: the head's cost is N, not B·L."""
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    return model.forward_head(hidden[labels > 0][None])[0]
