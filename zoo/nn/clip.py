"""CLIP's vision transformer as the eyes of a language model: patch features of one of its middle layers.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020, §2.4.
"""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn.mlp import MLPConfig
from zoo.nn.token_reduction import cls_attention
from zoo.nn.vit import ViT, ViTConfig


@config
class VisionTowerConfig:
    """The defaults are CLIP ViT-L/14 at 336 pixels.

    Attributes:
        vit: blocks.
        size: side of the pictures in pixels; patch: side of a patch.
        layer: hidden state that is read: 0 the embeddings, i the output of block i, negative ones from the end (-2 is
            LLaVA's: the last but one).
        mean: subtracted from pixels in [0, 1], a channel; std: they are divided by it.
    """

    vit: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=1024, layers=24, heads=16, mlp=MLPConfig(kind="quick_gelu", width=4096), eps=1e-5
        )
    )
    size: int = 336
    patch: int = 14
    layer: int = -2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"pictures of {self.size} pixels do not divide into patches of {self.patch}")
        if not -self.vit.layers - 1 <= self.layer <= self.vit.layers:
            raise ValueError(f"layer must lie in -{self.vit.layers + 1}..{self.vit.layers}, got {self.layer}")


class VisionTower(nn.Module):
    """Pixels [B, 3, S, S] in [0, 1] -> patch features [B, g², W] of the chosen layer, without the class token."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        width, self.grid = config.vit.width, config.size // config.patch
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.pos_embed = nn.Parameter(torch.randn(self.grid**2 + 1, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width, config.vit.eps)
        self.transformer = ViT(config.vit)
        self.norm_out = nn.LayerNorm(width, config.vit.eps)  # of CLIP's own pooled output; features do not pass it

    def normalize(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> what the first layer reads."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return (pixels - mean) / std

    def embeddings(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> [B, 1 + g², W] after the first norm, the class token in front.

        Raises:
            ZooError: pictures of another size.
        """
        size = self.config.size
        if pixels.ndim != 4 or list(pixels.shape[1:]) != [3, size, size]:
            raise ZooError(f"the vision tower takes pixels [B, 3, {size}, {size}], got {list(pixels.shape)}")
        pixels = self.normalize(pixels).to(self.patch_embed.weight.dtype)
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embed
        return self.norm_in(x)

    @property
    def depth(self) -> int:
        """Blocks in front of the layer that is read; those behind it are not run."""
        layer = self.config.layer
        return layer if layer >= 0 else len(self.transformer.blocks) + 1 + layer

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for block in self.transformer.blocks[: self.depth]:
            x = block(x)
        return x[:, 1:]

    def scored(self, pixels: Tensor, logits: bool = False) -> tuple[Tensor, Tensor]:
        """Features as `forward` makes them, and [B, g²] how much the class token attends to each patch.

        Args:
            logits: False: attention summed over heads, in the last block that is run (HiRED's late layer); True:
                logits averaged over heads, in the tower's last block (GlobalCom²).

        Raises:
            ZooError: the tower reads its embeddings, where no block has attended yet.
        """
        blocks = self.transformer.blocks
        at = len(blocks) if logits else self.depth
        if at == 0:
            raise ZooError("the vision tower reads its embeddings: no block has attended to them yet")
        x = self.embeddings(pixels)
        features, scores = x[:, 1:], x.new_zeros(0)
        for i, block in enumerate(blocks[: max(at, self.depth)], 1):
            if i == at:
                query, key = (block.attn.qkv(block.norm1(x))).chunk(3, -1)[:2]
                found = cls_attention(query, key, self.config.vit.heads, logits)
                scores = found.mean(1) if logits else found.sum(1)
            x = block(x)
            features = x[:, 1:] if i == self.depth else features
        return features, scores
