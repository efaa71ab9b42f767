"""METAGENE-1: a 7-billion-parameter decoder over a BPE vocabulary of wastewater reads.

Liu et al. 2025, "METAGENE-1: Metagenomic Foundation Model for Pandemic Monitoring", arXiv:2501.02045.
"""

from __future__ import annotations

import math
from dataclasses import field

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.models.decoder import Decoder, DecoderConfig, LayerAt
from zoo.nn.heads import HeadConfig, pool
from zoo.nn.layout import Layout
from zoo.nn.positions import RotaryConfig


@config
class METAGENEConfig(DecoderConfig):
    """Sizes of METAGENE-1, which are the defaults. Other fields: see DecoderConfig.

    Attributes:
        scaled_init: draw weights with sqrt(2 / (5 d)), and the projections into the residual stream with
            1 / (sqrt(d) n_layer), as its pre-training did, instead of init_std.
    """

    d_model: int = 4096
    n_layer: int = 32
    n_head: int = 32
    d_inner: int = 11008
    vocab_size: int = 1024
    max_len: int | None = 512
    rope: RotaryConfig | None = field(default_factory=RotaryConfig)
    hybrid: tuple[LayerAt, ...] = ()
    head: HeadConfig = field(default_factory=lambda: HeadConfig(tied=False))
    scaled_init: bool = True


class METAGENE(Decoder):
    """A decoder over BPE tokens of reads."""

    Config = METAGENEConfig
    config: METAGENEConfig

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.config.scaled_init:
            return
        width, depth = self.config.d_model, self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_stream = name.endswith(("out_proj", "down", "fc2"))
                std = 1 / (math.sqrt(width) * depth) if into_stream else math.sqrt(2 / (5 * width))
                nn.init.normal_(module.weight, std=std)
        self.head.reset_parameters(math.sqrt(2 / (5 * width)))

    def embed_reads(self, ids: Tensor, valid: Tensor | None = None, pads_count: bool = False) -> Tensor:
        """[B, D] mean of the last hidden states of ids [B, L] over real tokens.

        Args:
            ids: with [BOS] and [EOS], as the tokenizer gives them.
            valid: True for real tokens.
            pads_count: average over padding too, as the published embedding script does when it pads; needs
                `padding: eager` to have hidden states there.
        """
        hidden, _ = self.forward_features(ids, Layout("causal", valid=valid))
        return pool(hidden, valid, "mean_all" if pads_count else "mean")


def stuff(reads: list[Tensor], length: int, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Context stuffing: several reads in each window of *length* tokens, in order, cut where a window ends.

    Returns:
        ids [N, length], segment [N, length] (a read never sees another: pass it as `Layout.segment`; rotary positions
        need no reset, since attention sees only their differences), and valid [N, length].
    """
    joined = torch.cat(reads)
    segment = torch.repeat_interleave(torch.arange(len(reads)), torch.tensor([len(read) for read in reads]))
    rows = -(-len(joined) // length)
    ids = joined.new_full((rows * length,), pad)
    parts = segment.new_full((rows * length,), len(reads))
    valid = torch.zeros(rows * length, dtype=torch.bool)
    ids[: len(joined)], parts[: len(joined)], valid[: len(joined)] = joined, segment, True
    return ids.view(rows, length), parts.view(rows, length), valid.view(rows, length)
