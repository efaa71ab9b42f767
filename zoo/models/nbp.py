"""NBP: a transformer over video tokens that predicts a block of tokens from the block before it.

Ren et al. 2025, Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, arXiv:2502.07737, section 3.
Blocks of one token are plain next-token prediction; the hybrid form predicts the first block token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.base import SequenceModel
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.heads import Head, HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig
from zoo.nn.state import State


@dataclass
class PlacedState(State):
    """The layers' states and the number of tokens consumed [B], which gives the next token's learned position."""

    stack: State
    consumed: Tensor


@config
class NBPConfig:
    """The defaults are the released 700M model for frame prediction on Kinetics-600.

    Attributes:
        d_model, n_layer: sizes of the stack.
        mixer, options: of every layer; the mixer must serve block-causal layouts, and decode.
        mlp: feed-forward network.
        video_vocab: codes of the video tokenizer.
        cond_vocab: rows of the condition's vocabulary: text tokens or classes, 0 for no condition.
        cond_tokens: tokens of the condition before the video: 1 for a class.
        grid: frames, rows and columns of a clip's tokens.
        block: tokens that come into being together.
        shape: frames, rows and columns of a block, whose product is `block`; None takes runs of the raster order, as
            the published weights do.
        hybrid: a begin-of-video token stands first and predicts the first block with the others of it, token by
            token; then that block's last token and block - 1 learned middle tokens predict the second one. Otherwise
            the first block is given (frames to be continued).
        cond_dropout: probability of training without the condition, for classifier-free guidance.
        max_len: learned positions.
        embed_dropout, resid_dropout: on the embedding, and on every sub-layer's output.
        eps: of the layer norms.
        init_std: standard deviation of the initial weights; that of wide models starts narrow ones too small.
        head: what the model predicts.
    """

    d_model: int = 1536
    n_layer: int = 24
    mixer: str = "attention"
    options: dict[str, Any] = field(default_factory=lambda: {"heads": 16, "bias": True, "out_bias": True})
    mlp: MLPConfig = field(default_factory=lambda: MLPConfig(kind="gelu", width=6144))
    video_vocab: int = 64000
    cond_vocab: int = 0
    cond_tokens: int = 0
    grid: tuple[int, int, int] = (5, 16, 16)
    block: int = 16
    shape: tuple[int, int, int] | None = None
    hybrid: bool = False
    cond_dropout: float = 0.0
    max_len: int = 5120
    embed_dropout: float = 0.1
    resid_dropout: float = 0.1
    eps: float = 1e-5
    init_std: float = 0.02
    head: HeadConfig = field(default_factory=lambda: HeadConfig(tied=False))

    def __post_init__(self) -> None:
        frames, rows, columns = self.grid
        length = frames * rows * columns
        if length % self.block:
            raise ValueError(f"{length} tokens of a clip are not whole blocks of {self.block}")
        if self.shape is not None:
            if self.shape[0] * self.shape[1] * self.shape[2] != self.block:
                raise ValueError(f"a block of shape {list(self.shape)} does not hold {self.block} tokens")
            if any(side % part for side, part in zip(self.grid, self.shape, strict=True)):
                raise ValueError(f"blocks of shape {list(self.shape)} do not tile a clip of {list(self.grid)} tokens")
        if bool(self.cond_vocab) != bool(self.cond_tokens):
            raise ValueError("cond_vocab and cond_tokens go together: both 0 or both positive")
        longest = self.cond_tokens + length + (self.block if self.hybrid else 0)
        if longest > self.max_len:
            raise ValueError(f"clips are {longest} tokens long with all that stands before them, over max_len")

    @property
    def specials(self) -> int:
        """Begin-of-video and the middle tokens, the first rows of the vocabulary."""
        return self.block if self.hybrid else 0

    @property
    def first_video(self) -> int:
        """Row of the vocabulary of video code 0."""
        return self.specials + self.cond_vocab

    @property
    def vocab_size(self) -> int:
        return self.first_video + self.video_vocab


def block_order(grid: tuple[int, int, int], shape: tuple[int, int, int]) -> Tensor:
    """[L] raster places of a clip's tokens in the order of its blocks of *shape*: blocks in raster order, and in each
    block its tokens in raster order."""
    places = torch.arange(math.prod(grid)).reshape(grid)
    for axis in (0, 1, 2):  # [T / t, t, H / h, h, W / w, w]
        places = places.unflatten(2 * axis, (-1, shape[axis]))
    return places.permute(0, 2, 4, 1, 3, 5).flatten()


class NBP(SequenceModel):
    """ids [B, S] (specials, condition and video in one vocabulary) -> logits [B, S, V] under the model's block mask.

    `arrange` makes such ids of a clip's codes. Ids from V on stand for the absent condition.
    """

    layout_kind = "block_causal"
    Config = NBPConfig
    uncond: Tensor
    order: Tensor

    def __init__(self, config: NBPConfig) -> None:
        super().__init__()
        self.config = config
        self.max_len = config.max_len
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_len, config.d_model)
        self.register_buffer("uncond", torch.randn(config.cond_tokens, config.d_model) * config.d_model**-0.5)
        self.dropout = nn.Dropout(config.embed_dropout)
        spec = LayerSpec(mixer=config.mixer, options=config.options, mlp=config.mlp)
        self.backbone = Backbone(
            BackboneConfig(
                d_model=config.d_model, layers=(spec,) * config.n_layer, layout="block_causal", eps=config.eps,
                dropout=config.resid_dropout,
            )
        )  # fmt: skip
        self.head = Head(config.head, config.d_model, config.vocab_size)
        order = block_order(config.grid, config.shape or (1, 1, 1))
        self.register_buffer("order", order, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # --- sequences

    def arrange(self, codes: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Video codes [B, T, H, W] (and cond [B, cond_tokens] or [B]) -> ids [B, S] and the targets [B, L'] of the
        last L' positions.

        Raises:
            ZooError: codes of another grid or outside the vocabulary, or a condition where none is taken (or none
                where one is).
        """
        c = self.config
        if tuple(codes.shape[1:]) != c.grid:
            raise ZooError(f"this NBP was built for {list(c.grid)} tokens a clip, got {list(codes.shape[1:])}")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= c.video_vocab):
            raise ZooError(f"video codes lie between 0 and {c.video_vocab - 1}, got {int(codes.max())}")
        video = codes.flatten(1)[:, self.order] + c.first_video
        head = self.condition(cond, len(codes))
        if not c.hybrid:
            return torch.cat([head, video], 1)[:, : -c.block], video[:, c.block :]
        bov, middle = self.specials(len(codes))
        ids = torch.cat([head, bov, video[:, : c.block], middle, video[:, c.block :]], 1)
        return ids[:, : -c.block], video

    def condition(self, cond: Tensor | None, batch: int) -> Tensor:
        """[B, cond_tokens] ids of a condition; those of the absent one where *cond* is None in a conditional model.

        Raises:
            ZooError: a condition of another length, outside its vocabulary, or for a model that takes none.
        """
        c = self.config
        if not c.cond_tokens:
            if cond is not None and cond.numel():
                raise ZooError("this NBP takes no condition (cond_vocab is 0)")
            return torch.zeros(batch, 0, dtype=torch.long, device=self.uncond.device)
        if cond is None:
            return (torch.arange(c.cond_tokens, device=self.uncond.device) + c.vocab_size).expand(batch, -1)
        cond = cond.reshape(batch, -1)
        if cond.shape[1] != c.cond_tokens or int(cond.min()) < 0 or int(cond.max()) >= c.cond_vocab:
            raise ZooError(
                f"a condition is {c.cond_tokens} ids from 0 to {c.cond_vocab - 1}, got {list(cond.shape)} "
                f"from {int(cond.min())} to {int(cond.max())}"
            )
        return cond + c.specials

    def specials(self, batch: int) -> tuple[Tensor, Tensor]:
        """The begin-of-video token [B, 1] and the middle tokens [B, block - 1]."""
        ids = torch.arange(self.config.block, device=self.uncond.device).expand(batch, -1)
        return ids[:, :1], ids[:, 1:]

    def to_codes(self, ids: Tensor) -> Tensor:
        """Generated ids [B, L] in decoding order -> codes [B, T, H, W]; ids that are no video codes are clamped."""
        codes = (ids - self.config.first_video).clamp(0, self.config.video_vocab - 1)
        raster = torch.empty_like(codes)
        raster[:, self.order] = codes
        return raster.unflatten(1, self.config.grid)

    def block_index(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """[S] block of each position: the condition is one, and a token predicted alone is one."""
        c = self.config
        place = torch.arange(length, device=device) - c.cond_tokens
        single = c.block if c.hybrid else 0
        index = torch.where(place < single, place, single + (place - single).div(c.block, rounding_mode="floor"))
        return torch.where(place < 0, 0, index + 1)

    # --- passes

    def embed_tokens(self, ids: Tensor, layout: Layout) -> Tensor:
        x = self.embed(ids.clamp_max(self.config.vocab_size - 1))  # [B, S, D]
        if self.config.cond_tokens:
            absent = ids - self.config.vocab_size
            null = self.uncond[absent.clamp_min(0)].to(x.dtype)
            x = torch.where((absent >= 0)[..., None], null, x)
        return self.dropout(x + self.positions(layout.positions(ids.shape[0], ids.shape[1], ids.device)))

    def forward_features(self, ids: Tensor, layout: Layout | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """As `SequenceModel.forward_features`; without a layout the model's own mask, from the sequence's start."""
        self.check_length(ids.shape[1])
        layout = Layout("block_causal") if layout is None else layout
        if layout.kind == "block_causal" and layout.block is None:
            layout = layout.with_(block=self.block_index(ids.shape[1], ids.device))
        if state is None:
            return self.backbone(self.embed_tokens(ids, layout), layout)
        if layout.position is None:
            layout = layout.with_(position=layout.positions(ids.shape[0], ids.shape[1], ids.device, state.consumed))
        hidden, stack = self.backbone(self.embed_tokens(ids, layout), layout, state.stack)
        new = ids.shape[1] if layout.valid is None else layout.valid.sum(1)
        return hidden, PlacedState(stack, state.consumed + new)

    def init_state(
        self,
        batch: int,
        max_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PlacedState:
        stack = super().init_state(batch, max_len, device, dtype)
        return PlacedState(stack, torch.zeros(batch, dtype=torch.long, device=device))

    def loss(self, codes: Tensor, cond: Tensor | None = None) -> dict[str, Tensor]:
        """Cross-entropy over the whole vocabulary, `acc1` and `acc5` in percent, and the `logits` [B, L', V]."""
        ids, targets = self.arrange(codes, cond)
        if self.training and self.config.cond_dropout and self.config.cond_tokens:
            drop = torch.rand(len(ids), 1, device=ids.device) < self.config.cond_dropout
            n = self.config.cond_tokens
            ids = torch.cat([torch.where(drop, self.condition(None, len(ids)), ids[:, :n]), ids[:, n:]], 1)
        hidden, _ = self.forward_features(ids)
        logits = self.forward_head(hidden[:, -targets.shape[1] :])
        found = logits.detach().topk(min(5, logits.shape[-1]), -1).indices == targets[..., None]
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
            "acc1": 100 * found[..., 0].float().mean(),
            "acc5": 100 * found.any(-1).float().mean(),
            "logits": logits,
        }

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: what a saved model is checked with."""
        c, source = self.config, torch.Generator().manual_seed(20)
        codes = torch.randint(c.video_vocab, (1, *c.grid), generator=source)
        cond = torch.randint(c.cond_vocab, (1, c.cond_tokens), generator=source) if c.cond_tokens else None
        return {"ids": self.arrange(codes, cond)[0][:, :128]}
