"""Class-conditional sampling of RAR, token by token, with classifier-free guidance and a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.loop import decode
from zoo.generate.maskgit import power_cosine
from zoo.models.rar import RAR


@torch.no_grad()
def generate_rar(
    model: RAR,
    classes: Tensor,
    guidance: float = 16.0,
    power: float = 2.75,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Raster ids [B, L] for *classes* [B]; *temperature* 0 takes the likeliest token, *guidance* 0 switches it off.

    The guidance scale rises from 1 to *guidance* by the power-cosine schedule, as the published samples do. *tokens*
    stops early: the first ones are a whole, coarser picture where the tokenizer orders them (FlexTok).

    Raises:
        ZooError: more tokens than the model makes.
    """
    length = model.config.length
    count = length if tokens is None else tokens
    if not 1 <= count <= length:
        raise ZooError(f"this RAR makes 1 to {length} tokens, {count} were asked for")
    scheme = _Raster(model, classes, guidance, power, temperature, generator, count)
    decode(scheme, scheme.run)
    return scheme.ids


class _Raster:
    """One image token after the other."""

    def __init__(
        self,
        model: RAR,
        classes: Tensor,
        guidance: float,
        power: float,
        temperature: float,
        generator: torch.Generator | None,
        count: int,
    ) -> None:
        self.model = model
        self.guidance, self.power, self.temperature = guidance, power, temperature
        self.generator = generator
        self.classes = torch.cat([classes, torch.full_like(classes, model.dropped)]) if guidance else classes
        self.caches = model.init_caches(len(self.classes), classes.device, model.head.weight.dtype)
        self.count = count
        self.ids = classes.new_zeros(len(classes), 0)

    def next(self) -> Tensor | None:
        return self.ids if self.ids.shape[1] < self.count else None

    def run(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of the next token, guided."""
        both = ids.repeat(2, 1) if self.guidance else ids
        logits = self.model(both, self.classes, caches=self.caches)[:, -1].float()
        if self.guidance:
            cond, uncond = logits.chunk(2)
            scale = power_cosine(self.guidance, ids.shape[1] / self.model.config.length, self.power)
            logits = uncond + (cond - uncond) * scale
        return logits

    def take(self, ids: Tensor, logits: Tensor) -> None:
        if self.temperature:
            p = torch.softmax(logits / self.temperature, -1)
            chosen = torch.multinomial(p, 1, generator=self.generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        self.ids = torch.cat([ids, chosen], 1)
