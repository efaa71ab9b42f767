"""MaskGIT: a bidirectional transformer that fills in masked image tokens, conditioned on a class.

Chang et al. 2022 (arXiv 2202.04200) section 3.2, in the two forms that TiTok's generators use: a BERT, and the U-ViT
of Bao et al. 2022 (arXiv 2209.12152) whose second half sees the first through long skips.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.visual import trunc_normal_init
from zoo.nn.mixer import ParamGroup, split_param_groups
from zoo.nn.mlp import MLPConfig
from zoo.nn.vit import ViTBlock, ViTConfig


@config
class MaskGITConfig:
    """The defaults are TiTok's generator for L-32 (177.2 M elements).

    Attributes:
        kind: `bert` (norms after the sums, token type embeddings) or `uvit` (long skips; an even number of layers
            and one in the middle).
        codes: size of the image vocabulary; ids above it are the mask, the classes and the dropped class.
        classes: number of classes.
        length: image tokens.
        vit: blocks; `layers` counts all but the middle one of a U-ViT.
        class_dropout: probability of training without the class, for classifier-free guidance.
        label_smoothing: of the training loss.
        unmasked_weight: of tokens that were not masked, in the training loss.
    """

    kind: Literal["bert", "uvit"] = "bert"
    codes: int = 4096
    classes: int = 1000
    length: int = 32
    vit: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=768, layers=24, heads=16, mlp=MLPConfig(kind="gelu", width=3072),
            prenorm=False, eps=1e-12, dropout=0.1, attn_dropout=0.1,
        )
    )  # fmt: skip
    class_dropout: float = 0.1
    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.kind == "uvit" and self.vit.layers % 2:
            raise ValueError(f"a U-ViT needs an even number of layers, got {self.vit.layers}")


class MaskGIT(nn.Module):
    """Image ids [B, L] with masks, and classes [B] -> logits [B, L, codes].

    Vocabulary: [0, codes) image tokens, `mask_id` = codes, then the classes, then `dropped` (no class). The class
    stands before the image tokens and its output is dropped.
    """

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.vit.width, config.vit.layers
        self.mask_id, self.dropped = config.codes, config.classes
        self.embed = nn.Embedding(config.codes + config.classes + 2, width)
        self.pos_embed = nn.Parameter(torch.empty(config.length + 1, width))
        self.type_embed: nn.Parameter | None = None
        uvit = config.kind == "uvit"
        self.norm = nn.LayerNorm(width, config.vit.eps)  # of the embeddings in a BERT, of the output in a U-ViT
        if not uvit:
            self.type_embed = nn.Parameter(torch.empty(2, width))  # the second row is never used but is in the weights
        self.blocks = nn.ModuleList(ViTBlock(config.vit) for _ in range(depth + uvit))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2 if uvit else 0))
        self.dropout = nn.Dropout(config.vit.dropout)
        self.head = nn.Linear(width, config.codes)
        self.apply(trunc_normal_init)
        for table in (self.pos_embed, self.type_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, ids: Tensor, classes: Tensor) -> Tensor:
        """*classes* [B] hold class numbers, or `dropped` for none.

        Raises:
            ZooError: more tokens than the model has positions for.
        """
        if ids.shape[1] > self.config.length:
            raise ZooError(f"MaskGIT was built for {self.config.length} tokens, got {ids.shape[1]}")
        x = self.embed(torch.cat([(classes + self.config.codes + 1)[:, None], ids], 1))
        x = x + self.pos_embed[: x.shape[1]]
        if self.type_embed is not None:
            x = self.dropout(self.norm(x + self.type_embed[0]))
            for block in self.blocks:
                x = block(x)
            return self.head(x[:, 1:])
        half, kept = len(self.skips), []
        for block in self.blocks[:half]:
            x = block(x)
            kept.append(x)
        x = self.blocks[half](x)
        for block, skip in zip(self.blocks[half + 1 :], self.skips, strict=True):
            x = block(skip(torch.cat([x, kept.pop()], -1)))
        return self.head(self.norm(x)[:, 1:])

    def drop_classes(self, classes: Tensor) -> Tensor:
        """Replace each class by `dropped` with the configured probability."""
        drop = torch.rand(classes.shape, device=classes.device) < self.config.class_dropout
        return torch.where(drop, self.dropped, classes)

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: what a saved model is checked with."""
        source = torch.Generator().manual_seed(20)
        ids = torch.randint(self.config.codes, (2, self.config.length), generator=source)
        return {"ids": ids, "classes": torch.randint(self.config.classes, (2,), generator=source)}

    def param_groups(self) -> list[ParamGroup]:
        """All parameters in one group."""
        return split_param_groups(self)


def mask_tokens(
    ids: Tensor, mask_id: int, time: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask a share acos(u) / (π/2) of each row of ids [B, L] for training, at least one token.

    *time* [B] and *order* [B, L] are the uniform draws behind the share and the places. Returns (ids with masks, mask).
    """
    time = torch.rand(len(ids), device=ids.device) if time is None else time
    order = torch.rand(ids.shape, device=ids.device) if order is None else order
    share = torch.acos(time) / (math.pi / 2)
    count = (ids.shape[1] * share).round().clamp_min(1)
    mask = order.argsort(-1) < count[:, None]
    return torch.where(mask, mask_id, ids), mask


def masked_loss(
    logits: Tensor, ids: Tensor, mask: Tensor, label_smoothing: float = 0.1, unmasked_weight: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of logits [B, L, V] against ids [B, L]; and the masked accuracy, averaged over rows."""
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=label_smoothing)
    weights = torch.where(mask, 1.0, unmasked_weight).to(losses.dtype)
    hit = (logits.argmax(-1) == ids) & mask
    correct = (hit.sum(1) / mask.sum(1).clamp_min(1)).mean()
    return (losses * weights).sum() / (weights.sum() + 1e-8), correct
