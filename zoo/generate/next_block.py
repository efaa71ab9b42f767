"""Video tokens from an NBP model, a block a pass, with a key-value cache and classifier-free guidance.

Ren et al. 2025, arXiv:2502.07737, section 3.3. Tokens of a block are drawn independently of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.loop import decode
from zoo.generate.samplers import Context, Temperature, TopK, TopP, Warper, warp
from zoo.models.nbp import NBP
from zoo.nn.layout import Layout


@dataclass
class VideoTokens:
    """Generated clips.

    Attributes:
        ids: [B, L] generated ids in decoding order, as the model's vocabulary numbers them.
        prefix: [B, P] ids that the first pass consumed.
        codes: [B, T, H, W] the clips as video codes, given frames included.
        steps: passes through the model.
    """

    ids: Tensor
    prefix: Tensor
    codes: Tensor
    steps: int


@torch.inference_mode()
def generate_blocks(
    model: NBP,
    cond: Tensor | None = None,
    frames: Tensor | None = None,
    *,
    batch: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    video_only: bool = True,
    generator: torch.Generator | None = None,
) -> VideoTokens:
    """Clips of *cond* [B, cond_tokens] that begin with the latent *frames* [B, t, H, W].

    Args:
        model: hybrid ones start from nothing and take no frames; others need at least one block of them.
        cond: condition, None for none.
        frames: codes of the first latent frames.
        batch: clips, where neither *cond* nor *frames* tells.
        temperature: of the logits; 0 takes the likeliest token.
        top_k, top_p: see GenerateConfig; 0 and 1 switch them off.
        guidance: scale of classifier-free guidance; 1 switches it off.
        video_only: draw video codes only. The official sampler draws any id and clamps it afterwards.
        generator: source of the draws.

    Raises:
        ZooError: frames for a hybrid model or none for another, frames that are no whole blocks or all of the clip,
            or guidance without a condition.
    """
    c = model.config
    if guidance != 1 and (cond is None or not c.cond_tokens):
        raise ZooError("guidance needs a model with a condition, and a condition")
    if cond is not None and c.cond_tokens:
        batch = len(cond)
    elif frames is not None:
        batch = len(frames)
    start = _given(model, frames, batch)
    head = model.condition(cond, batch)
    rows = [head] if guidance == 1 else [head, model.condition(None, batch)]
    prompt = torch.cat([torch.cat([row, start], 1) for row in rows])
    law = _Law(c.first_video if video_only else 0, temperature, top_k, top_p, generator)
    scheme = _NextBlocks(model, prompt, start, law)
    target = _Target(model, guidance, batch * len(rows))
    training = model.training
    model.eval()
    try:
        decode(scheme, target)
    finally:
        model.train(training)
    ids = torch.cat(scheme.made, 1)
    prefix = torch.cat([head, start], 1)
    return VideoTokens(ids if c.hybrid else ids[:, start.shape[1] :], prefix, model.to_codes(ids), target.steps)


def _given(model: NBP, frames: Tensor | None, batch: int) -> Tensor:
    """What stands between the condition and the first generated token, [B, n]."""
    c = model.config
    if c.hybrid:
        if frames is not None:
            raise ZooError("a hybrid NBP begins each clip itself and takes no frames")
        return model.specials(batch)[0]
    if frames is None:
        raise ZooError("this NBP continues frames: give the codes of the first ones")
    if tuple(frames.shape[2:]) != c.grid[1:] or not 0 < frames.shape[1] < c.grid[0]:
        raise ZooError(f"frames are [B, 1 to {c.grid[0] - 1}, {c.grid[1]}, {c.grid[2]}], got {list(frames.shape)}")
    count = frames[0].numel()
    if count % c.block or (c.shape is not None and frames.shape[1] % c.shape[0]):
        raise ZooError(f"{frames.shape[1]} latent frames are no whole blocks")
    clip = frames.new_zeros(batch, *c.grid)
    clip[:, : frames.shape[1]] = frames
    return clip.flatten(1)[:, model.order][:, :count] + c.first_video


class _NextBlocks:
    """NBP's order of decoding: a block a pass; in the hybrid form the first block token by token.

    Attributes:
        made: [B, n] ids, one entry a pass; of a model that continues frames those of the frames come first.
    """

    def __init__(self, model: NBP, prompt: Tensor, start: Tensor, law: _Law) -> None:
        c = model.config
        self.block, self.hybrid, self.middle = c.block, c.hybrid, model.specials(len(start))[1]
        self.law, self.total = law, int(model.order.numel())
        self.made = [] if c.hybrid else [start]
        self.have = 0 if c.hybrid else start.shape[1]
        self.waiting = prompt

    def next(self) -> Tensor | None:
        """The ids [B, n] that the model has not consumed yet."""
        return self.waiting if self.have < self.total else None

    def take(self, work: Tensor, logits: Tensor) -> None:
        alone = self.hybrid and self.have < self.block
        new = self.law.draw(logits[:, -(1 if alone else self.block) :])
        self.made.append(new)
        self.have += new.shape[1]
        self.waiting = torch.cat([new, self.middle], 1) if self.hybrid and self.have == self.block else new


class _Target:
    """The model with its state; guided rows stand below the conditional ones."""

    def __init__(self, model: NBP, guidance: float, rows: int) -> None:
        c = model.config
        weight = model.embed.weight
        room = c.cond_tokens + int(model.order.numel()) + c.specials
        self.model, self.guidance, self.rows, self.steps = model, guidance, rows, 0
        self.state = model.init_state(rows, room, weight.device, weight.dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, n, V] of the last n ids, at most a block; after the prompt a block sees all of itself."""
        kind = "full" if ids.shape[1] > 1 else "causal"
        layout = Layout(kind if self.steps else "block_causal")
        self.steps += 1
        ids = ids if len(ids) == self.rows else ids.repeat(2, 1)
        hidden, self.state = self.model.forward_features(ids, layout, self.state)
        logits = self.model.forward_head(hidden[:, -self.model.config.block :])
        if self.guidance == 1:
            return logits
        given, without = logits.chunk(2)
        return without + (given - without) * self.guidance


class _Law:
    """How a token is drawn from its logits: ids below *first* never, the rest through the samplers."""

    def __init__(
        self, first: int, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
    ) -> None:
        self.first, self.greedy, self.generator = first, temperature == 0, generator
        self.warpers: list[Warper] = []
        if not self.greedy:
            self.warpers = [Temperature(temperature)] if temperature != 1 else []
            self.warpers += [TopK(top_k)] if top_k else []
            self.warpers += [TopP(top_p)] if top_p < 1 else []

    def draw(self, logits: Tensor) -> Tensor:
        """[B, n, V] -> [B, n] tokens, each drawn on its own."""
        logits = logits.float()
        logits[..., : self.first] = float("-inf")
        if self.greedy:
            return logits.argmax(-1)
        flat = logits.flatten(0, 1)
        context = Context(torch.zeros(len(flat), dtype=torch.long, device=flat.device))
        law = torch.softmax(warp(flat, self.warpers, context), -1)
        return torch.multinomial(law, 1, generator=self.generator).reshape(logits.shape[:2])
