"""Class-conditional sampling of RAR, token by token, with classifier-free guidance and a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError
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
    length, batch = model.config.length, len(classes)
    count = length if tokens is None else tokens
    if not 1 <= count <= length:
        raise ZooError(f"this RAR makes 1 to {length} tokens, {count} were asked for")
    both = torch.cat([classes, torch.full_like(classes, model.dropped)]) if guidance else classes
    caches = model.init_caches(len(both), classes.device, model.head.weight.dtype)
    ids = classes.new_zeros(batch, 0)
    for step in range(count):
        logits = model(ids.repeat(2, 1) if guidance else ids, both, caches=caches)[:, -1].float()
        if guidance:
            cond, uncond = logits.chunk(2)
            logits = uncond + (cond - uncond) * power_cosine(guidance, step / length, power)
        if temperature:
            p = torch.softmax(logits / temperature, -1)
            chosen = torch.multinomial(p, 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
    return ids
