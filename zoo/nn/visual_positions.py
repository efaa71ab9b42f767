"""Positions of text with pictures in it, where visual tokens take less than one step (V2PE).

Ge et al. 2024, "V2PE: Improving Multimodal Long-Context Capability of Vision-Language Models with Variable Visual
Position Encoding", arXiv:2412.09616, §3.2. Rotary embedding takes the fractions as they are (`zoo.nn.positions`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def image_spans(ids: Tensor, start: int, end: int) -> list[tuple[int, int]]:
    """[first, last) of the visual tokens of each picture in ids [L]: what stands between the ids *start* and *end*."""
    opened = (ids == start).nonzero()[:, 0].tolist()
    closed = (ids == end).nonzero()[:, 0].tolist()
    return [(a + 1, b) for a, b in zip(opened, closed, strict=True)]


def visual_positions(ids: Tensor, start: int, end: int, deltas: float | Sequence[float]) -> Tensor:
    """Positions [L], float32, of ids [L].

    A text token, the opening one of a picture among them, stands one after its predecessor; each visual token stands
    *deltas* (one for all pictures, or one a picture) after its predecessor; the token that closes the picture stands
    one after the last visual position, rounded up.
    """
    spans = image_spans(ids, start, end)
    steps = [float(deltas)] * len(spans) if isinstance(deltas, int | float) else list(deltas)
    parts, done, at = [], 0, -1.0
    for (first, last), delta in zip(spans, steps, strict=True):
        parts.append(at + torch.arange(1, first - done + 1, dtype=torch.float64))
        at += first - done
        visual = (at + torch.arange(1, last - first + 1, dtype=torch.float64) * delta).float()
        parts.append(visual.double())
        at = float(visual[-1].ceil()) if len(visual) else at
        done = last
    parts.append(at + torch.arange(1, len(ids) - done + 1, dtype=torch.float64))
    return torch.cat(parts).float()


def random_strides(images: int, choices: Sequence[int], seed: int) -> list[int]:
    """One stride a picture, drawn as V2PE's training does (`random.choice`)."""
    source = random.Random(seed)
    return [source.choice(list(choices)) for _ in range(images)]
