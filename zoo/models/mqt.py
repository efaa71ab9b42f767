"""A vision-language model with an elastic number of visual tokens: vision tower, query transformer, causal decoder.

Hu et al. 2024 (MQT-LLaVA, arXiv:2405.19315); with `projector: mlp` it has the shape of LLaVA-1.5 (Liu et al. 2024,
arXiv:2310.03744), every patch one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError, nearest
from zoo.models.decoder import Decoder, DecoderConfig
from zoo.nn.clip import VisionTower, VisionTowerConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mixer import ParamGroup, split_param_groups
from zoo.nn.query_transformer import QueryTransformer, QueryTransformerConfig
from zoo.nn.timm_tower import TimmTower, TimmTowerConfig
from zoo.nn.token_reduction import reduce_to

IGNORE = -100
REDUCERS = ("hired", "globalcom2", "pool")


@config
class MQTConfig:
    """The defaults are those of MQT-LLaVA-7B.

    Attributes:
        tower: vision transformer.
        timm: a model of timm in its place; then `tower` means nothing.
        projector: `queries`, the elastic query transformer, or `mlp`: two linear layers with a GELU (LLaVA-1.5).
        queries: of the query transformer; its widths must be those of tower and decoder.
        lm: decoder, of any causal mixer.
        image_token: id in the text where a picture's tokens are put; no row of the embedding.
        freeze_tower: do not train the vision tower.
        freeze_lm: do not train the decoder (the first stage of training, which fits the projector alone).
    """

    tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    timm: TimmTowerConfig | None = None
    projector: Literal["queries", "mlp"] = "queries"
    queries: QueryTransformerConfig = field(default_factory=QueryTransformerConfig)
    lm: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            d_model=4096, n_layer=32, n_head=32, d_inner=11008, vocab_size=32000, max_len=4096,
            head=HeadConfig(tied=False),
        )
    )  # fmt: skip
    image_token: int = -200
    freeze_tower: bool = True
    freeze_lm: bool = False

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.timm.size if self.timm else self.tower.size

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.size // (self.timm.patch if self.timm else self.tower.patch)

    @property
    def features(self) -> int:
        """Width of the tower's features."""
        return self.timm.width if self.timm else self.tower.vit.width

    @property
    def max_tokens(self) -> int:
        """Most visual tokens of a picture."""
        return self.queries.grid**2 if self.projector == "queries" else self.side**2

    def __post_init__(self) -> None:
        if self.lm.head.kind != "lm":
            raise ValueError(f"the decoder needs a head of kind 'lm', got '{self.lm.head.kind}'")
        if self.projector == "queries":
            wanted = (self.features, self.lm.d_model, (self.side, self.side))
            if (self.queries.width, self.queries.out_width, tuple(self.queries.source)) != wanted:
                raise ValueError(
                    f"queries must have width {wanted[0]} (the tower's), out_width {wanted[1]} (the decoder's) and "
                    f"source {list(wanted[2])} (the tower's grid)"
                )


@dataclass(frozen=True)
class Spliced:
    """Text with the pictures put in.

    Attributes:
        embeds: [B, L', D], 0 at padding.
        valid: [B, L'] bool.
        labels: [B, L'] long, -100 at visual tokens and padding; None where none were given.
    """

    embeds: Tensor
    valid: Tensor
    labels: Tensor | None


class MQT(nn.Module):
    """ids [B, L] with `image_token` placeholders and pixels [N, 3, S, S] -> next-token logits [B, L', V]."""

    Config = MQTConfig
    trained_whole = ("projector",)  # beside adapters in the decoder

    def __init__(self, config: MQTConfig) -> None:
        super().__init__()
        self.config = config
        self.tower: VisionTower | TimmTower = TimmTower(config.timm) if config.timm else VisionTower(config.tower)
        width, out = config.features, config.lm.d_model
        self.projector = (
            QueryTransformer(config.queries)
            if config.projector == "queries"
            else nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        )
        self.lm = Decoder(config.lm)
        self.still = [part for part, off in ((self.tower, config.freeze_tower), (self.lm, config.freeze_lm)) if off]
        for part in self.still:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> MQT:
        """As of any module, but frozen parts stay in evaluation: no dropout, no batch statistics."""
        super().train(mode)
        for part in self.still:
            part.eval()
        return self

    def visual_tokens(self, pixels: Tensor, m: int | None = None, reducer: str = "") -> Tensor:
        """Pixels [N, 3, S, S] in [0, 1] -> tokens [N, m, D].

        Args:
            pixels: pictures.
            m: tokens of each; None: as many as training draws, or all.
            reducer: `hired`, `globalcom2` or `pool`: make all tokens and cut them to m by that rule, which was not
                trained, instead of by the query transformer's order.

        Raises:
            ZooError: m outside 1..M, or an m for the `mlp` projector without a *reducer*; see `reduced`.
        """
        if reducer:
            return self.reduced(pixels, m or self.config.max_tokens, reducer)
        features = self.tower(pixels)
        if isinstance(self.projector, QueryTransformer):
            return self.projector(features, m)
        if m not in (None, features.shape[1]):
            raise ZooError(f"the mlp projector makes {features.shape[1]} tokens a picture, asked for {m}")
        return self.projector(features)

    def reduced(self, pixels: Tensor, m: int, kind: str) -> Tensor:
        """All tokens of the projector, [N, M, D], cut to [N, m, D] without training; see `zoo.nn.token_reduction`.

        A query has the class token's attention of the patches that it reads itself, weighted by its own attention.

        Raises:
            ZooError: m is not in 1..M, no rule of that name, or one that needs a class token the tower lacks.
        """
        if kind not in REDUCERS:
            raise ZooError(f"no rule '{kind}' to reduce visual tokens" + nearest(kind, REDUCERS))
        scores: Tensor | None = None
        if kind == "pool":
            features = self.tower(pixels)
        elif isinstance(self.tower, TimmTower):
            raise ZooError(f"{kind} reads the attention of CLIP's class token, which a tower of timm does not give")
        else:
            features, scores = self.tower.scored(pixels, logits=kind == "globalcom2")
        if not isinstance(self.projector, QueryTransformer):
            return reduce_to(self.projector(features), m, kind, scores)
        most = self.projector.max_tokens
        if scores is not None:
            reads = self.projector.attention(most, self.projector.keys(features)).mean(1)  # [1 or N, M, S]
            scores = (reads @ scores[..., None])[..., 0]
        return reduce_to(self.projector(features, most), m, kind, scores)

    def splice(
        self, ids: Tensor, tokens: Tensor | list[Tensor], valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Spliced:
        """Put visual *tokens* (one entry [m, D] a placeholder, in reading order) into the text ids [B, L].

        Rows are padded on the right, whichever side their text was padded on.

        Raises:
            ZooError: the numbers of placeholders and pictures differ.
        """
        if ids.is_meta:
            return self._shapes(ids, torch.stack(list(tokens)))
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        places = (ids == self.config.image_token) & valid
        if int(places.sum()) != len(tokens):
            raise ZooError(f"the text has {int(places.sum())} image placeholders but {len(tokens)} pictures were given")
        source, rows, targets = iter(tokens), [], []
        for b in range(len(ids)):
            text, place = ids[b][valid[b]], places[b][valid[b]]
            target = labels[b][valid[b]] if labels is not None else torch.full_like(text, IGNORE)
            embeds, marks, done = [], [], 0
            for at in place.nonzero()[:, 0].tolist():
                visual = next(source)
                embeds += [self.lm.embed(text[done:at]), visual.to(self.lm.embed.weight.dtype)]
                marks += [target[done:at], target.new_full((len(visual),), IGNORE)]
                done = at + 1
            rows.append(torch.cat([*embeds, self.lm.embed(text[done:])]))
            targets.append(torch.cat([*marks, target[done:]]))
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        pad = nn.utils.rnn.pad_sequence
        return Spliced(
            pad(rows, batch_first=True),
            torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None],
            pad(targets, batch_first=True, padding_value=IGNORE) if labels is not None else None,
        )

    def _shapes(self, ids: Tensor, tokens: Tensor) -> Spliced:
        """Without values there are no places to find: one picture behind the first token of each row."""
        embeds = torch.cat([self.lm.embed(ids[:, :1]), tokens, self.lm.embed(ids[:, 2:])], 1)
        return Spliced(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device="meta"), None)

    def read(self, spliced: Spliced) -> Tensor:
        """Logits [B, L', V]."""
        _, length, _ = spliced.embeds.shape
        self.lm.check_length(length)
        valid = None if spliced.valid.is_meta or bool(spliced.valid.all()) else spliced.valid
        layout = Layout("causal", valid=valid)
        if self.config.lm.padding != "skip":
            place = torch.arange(length, device=spliced.embeds.device).expand(spliced.valid.shape)
            layout = layout.with_(position=place)
        hidden, _ = self.lm.backbone(spliced.embeds, layout)
        return self.lm.forward_head(hidden)

    def forward(
        self, ids: Tensor, pixels: Tensor, valid: Tensor | None = None, m: int | None = None, reducer: str = ""
    ) -> Tensor:
        """Logits [B, L', V] of the text with every picture as *m* tokens (see `visual_tokens`)."""
        return self.read(self.splice(ids, self.visual_tokens(pixels, m, reducer), valid))

    def loss(
        self, ids: Tensor, pixels: Tensor, labels: Tensor, valid: Tensor | None = None, m: int | None = None
    ) -> Tensor:
        """Mean next-token cross-entropy over the labels [B, L] that are not -100."""
        spliced = self.splice(ids, self.visual_tokens(pixels, m), valid, labels)
        assert spliced.labels is not None
        return next_token_loss(self.read(spliced), spliced.labels)

    @torch.no_grad()
    def answer(
        self,
        ids: Tensor,
        pixels: Tensor,
        m: int | None = None,
        new: int = 16,
        end: int | None = None,
        reducer: str = "",
    ) -> Tensor:
        """Greedy continuation [new] or shorter of one prompt ids [L] about pixels [N, 3, S, S], up to the id *end*."""
        spliced = self.splice(ids[None], self.visual_tokens(pixels, m, reducer))
        length = spliced.embeds.shape[1]
        self.lm.check_length(length + new)
        like = self.lm.embed.weight
        state = self.lm.init_state(1, length + new, like.device, like.dtype)
        hidden, state = self.lm.backbone(spliced.embeds, Layout("causal"), state)
        chosen: list[Tensor] = []
        while len(chosen) < new:
            chosen.append(self.lm.forward_head(hidden[:, -1:])[0, -1].argmax())
            if len(chosen) == new or (end is not None and int(chosen[-1]) == end):
                break
            hidden, state = self.lm.forward_features(chosen[-1].view(1, 1), Layout("causal"), state)
        return torch.stack(chosen)

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: what a saved model is checked with."""
        generator = torch.Generator().manual_seed(20)
        size = self.config.size
        ids = torch.randint(0, self.config.lm.vocab_size, (1, 6), generator=generator)
        ids[0, 1] = self.config.image_token
        return {"ids": ids, "pixels": torch.rand(1, 3, size, size, generator=generator)}

    def step_inputs(self, batch: int, length: int) -> dict[str, Any]:
        """Arguments of `forward` for a training step without memory: *batch* rows of *length* ids, M tokens each."""
        size = self.config.size
        ids = torch.zeros(batch, max(length, 2), dtype=torch.long, device="meta")
        return {"ids": ids, "pixels": torch.empty(batch, 3, size, size, device="meta"), "m": self.config.max_tokens}

    def param_groups(self) -> list[ParamGroup]:
        """All trainable parameters with their optimiser settings."""
        return split_param_groups(self)

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute each block of the decoder in the backward pass instead of keeping its activations."""
        self.lm.set_grad_checkpointing(on)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, L, V] against the labels [B, L] one place later; -100 does not count."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
