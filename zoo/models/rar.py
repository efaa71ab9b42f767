"""RAR: an autoregressive image generator trained on randomly permuted token orders.

Yu et al. 2024 (arXiv 2411.00776) section 3: every position also carries the embedding of the position it predicts,
so one model serves all orders; the share of random orders falls to 0 in training. With only raster orders it is a
plain autoregressive transformer over image tokens.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.visual import trunc_normal_init
from zoo.nn.mixer import ParamGroup, split_param_groups
from zoo.nn.mlp import MLPConfig
from zoo.nn.vit import CAUSAL, KVCache, Modulation, ViT, ViTConfig, modulate


def rar_vit(
    width: int, layers: int, heads: int, inner: int, dropout: float = 0.1, attn_dropout: float = 0.1
) -> ViTConfig:
    """RAR's transformer: adaLN blocks with normalised queries and keys."""
    return ViTConfig(
        width=width, layers=layers, heads=heads, mlp=MLPConfig(kind="gelu", width=inner), qk_norm="affine",
        eps=1e-6, qk_eps=1e-6, adaln=True, dropout=dropout, attn_dropout=attn_dropout,
    )  # fmt: skip


@config
class RARConfig:
    """The defaults are RAR-B (260.9 M elements).

    Attributes:
        codes: size of the image vocabulary (1,024 of MaskGIT-VQGAN); the classes stand behind it.
        classes: number of classes.
        length: image tokens.
        vit: blocks.
        class_dropout: probability of training without the class.
        spare_positions: rows of the position tables beyond the picture's; spare_steps: of the step table. Two of each
            are used (start token and class), the weights hold more.
    """

    codes: int = 1024
    classes: int = 1000
    length: int = 256
    vit: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=768, layers=24, heads=16, mlp=MLPConfig(kind="gelu", width=3072), qk_norm="affine",
            eps=1e-6, qk_eps=1e-6, adaln=True, dropout=0.1, attn_dropout=0.1,
        )
    )  # fmt: skip
    class_dropout: float = 0.1
    spare_positions: int = 1024
    spare_steps: int = 100

    def __post_init__(self) -> None:
        if min(self.spare_positions, self.spare_steps) < 2:
            raise ValueError("the start token and the class need spare_positions and spare_steps of at least 2")


class RAR(nn.Module):
    """Ids [B, n] in decoding order and classes [B] -> logits [B, n + 1, codes]: of the next token after each.

    Sequence: start token, class, image tokens. The class (plus a step embedding) also modulates every block.
    """

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vit.width
        self.dropped = config.classes
        self.embed = nn.Embedding(config.codes + config.classes + 2, width)
        self.start_token = nn.Parameter(torch.zeros(1, width))
        rows = config.length + config.spare_positions
        self.pos_embed = nn.Parameter(0.02 * torch.randn(rows, width))
        self.target_pos_embed = nn.Parameter(0.02 * torch.randn(rows, width))
        self.step_embed = nn.Parameter(0.02 * torch.randn(config.length + config.spare_steps, width))
        self.head = nn.Linear(width, config.codes)
        self.apply(trunc_normal_init)
        self.transformer = ViT(config.vit)
        for name, part in self.transformer.named_modules():
            if ".modulation" not in name:  # these start at zero
                trunc_normal_init(part)
        self.norm_out = nn.LayerNorm(width, config.vit.eps, elementwise_affine=False)
        self.modulation = Modulation(width, 2)

    def forward(
        self, ids: Tensor, classes: Tensor, orders: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """*orders* [B, L]: the place in the picture of each step (None: raster); ids are in that order already.

        With *caches* (from `init_caches`) only the tokens that they do not hold yet are processed, and the logits of
        the last one, [B, 1, codes], are returned.

        Raises:
            ZooError: more tokens than the picture has.
        """
        config = self.config
        if ids.shape[1] > config.length:
            raise ZooError(f"RAR was built for {config.length} tokens, got {ids.shape[1]}")
        label = self.embed(classes + config.codes + 1)[:, None]  # [B, 1, D]
        x = torch.cat([self.start_token.expand(len(ids), 1, -1), label, self.embed(ids)], 1)  # [B, n + 2, D]
        here, target = self._places(self.pos_embed, orders), self._places(self.target_pos_embed, orders)
        x = x + torch.cat([self.pos_embed[:2].expand(len(here), -1, -1), here], 1)[:, : x.shape[1]]
        # the class predicts the first place, each token the one after it, the start token and the last token nothing
        target = F.pad(target, (0, 0, 1, 1))[:, : x.shape[1]]
        x = x + target
        condition = label + self.step_embed[: x.shape[1]]
        if caches is not None:
            past = caches[0].length
            x, condition = x[:, past:], condition[:, past:]
        x = self.transformer(x, CAUSAL, condition, caches=caches)
        first = -1 if caches is not None else 1
        x, condition = x[:, first:], condition[:, first:]
        shift, scale = self.modulation(condition)
        return self.head(modulate(self.norm_out(x), shift, scale))

    def _places(self, table: Tensor, orders: Tensor | None) -> Tensor:
        """Rows of a position table for the picture's places in decoding order, [1 or B, L, D]."""
        places = table[2 : 2 + self.config.length]
        return places[None] if orders is None else places[orders]

    def init_caches(
        self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[KVCache]:
        """Empty caches for generating whole pictures."""
        return self.transformer.init_caches(batch, self.config.length + 2, device, dtype)

    def drop_classes(self, classes: Tensor) -> Tensor:
        """Replace each class by `dropped` with the configured probability."""
        drop = torch.rand(classes.shape, device=classes.device) < self.config.class_dropout
        return torch.where(drop, self.dropped, classes)

    def loss(self, ids: Tensor, classes: Tensor, orders: Tensor) -> Tensor:
        """Cross-entropy of raster ids [B, L] predicted in *orders* [B, L]."""
        labels = ids.gather(1, orders)
        logits = self(labels, classes, orders)[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), labels)

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: what a saved model is checked with."""
        source = torch.Generator().manual_seed(20)
        ids = torch.randint(self.config.codes, (2, self.config.length), generator=source)
        return {"ids": ids, "classes": torch.randint(self.config.classes, (2,), generator=source)}

    def param_groups(self) -> list[ParamGroup]:
        """All parameters in one group."""
        return split_param_groups(self)


def random_orders(batch: int, length: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """[batch, length] int64: a random permutation with probability *share*, else the raster order."""
    raster = torch.arange(length, device=device).expand(batch, -1)
    shuffled = torch.rand(batch, length, device=device).argsort(-1)
    return torch.where(torch.rand(batch, 1, device=device) < share, shuffled, raster)


def random_share(step: int, start: int = 125_000, end: int = 187_500) -> float:
    """Share of random orders at a training step: 1 until *start*, 0 from *end* on, linear between."""
    return min(1.0, max(0.0, 1.0 - (step - start) / max(end - start, 1)))
