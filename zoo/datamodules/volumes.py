"""Inputs and targets of autoregressive pretraining on 3-D volumes.

Chen et al. 2024, TokenUnify, arXiv:2405.16847: three ways of hiding patches of one volume (a prefix for the next
patch, a prefix for all the rest, random patches), which training mixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.errors import ZooError

Size = tuple[int, int, int]


@dataclass
class PrefixTarget:
    """A volume of which only the first patches are left.

    Attributes:
        count: number of patches left.
        input: [D, H, W], the rest filled.
        next_patch: the first patch that is hidden, the target of next-token prediction; the whole clean volume is the
            one of next-all prediction.
    """

    count: int
    input: np.ndarray
    next_patch: np.ndarray


def patch_slices(shape: Size, patch: Size) -> list[tuple[slice, slice, slice]]:
    """The patches of a volume in raster order.

    Raises:
        ZooError: the patches do not tile the volume.
    """
    if any(side % part for side, part in zip(shape, patch, strict=True)):
        raise ZooError(f"patches of {list(patch)} do not tile a volume of {list(shape)}")
    d, h, w = patch
    return [
        (slice(z, z + d), slice(y, y + h), slice(x, x + w))
        for z in range(0, shape[0], d)
        for y in range(0, shape[1], h)
        for x in range(0, shape[2], w)
    ]


def keep_prefix(
    volume: np.ndarray, patch: Size, source: np.random.RandomState, fill: float | None = 0.0
) -> PrefixTarget:
    """Keep a random number of the first patches of *volume* [D, H, W], at least one and not all.

    The rest is filled with *fill*, or with standard normal noise where it is None.
    """
    places = patch_slices(_size(volume), patch)
    count = int(source.randint(1, len(places)))
    hidden = volume.copy()
    for place in places[count:]:  # noise is drawn patch by patch, so that a seed gives what the official code gives
        hidden[place] = source.randn(*patch) if fill is None else fill
    return PrefixTarget(count, hidden, volume[places[count]].copy())


def hide_random(volume: np.ndarray, patch: Size, source: np.random.RandomState, ratio: float = 0.5) -> np.ndarray:
    """*volume* [D, H, W] with the share *ratio* of its patches set to 0."""
    places = patch_slices(_size(volume), patch)
    hidden = volume.copy()
    for index in source.choice(len(places), int(len(places) * ratio), replace=False):
        hidden[places[index]] = 0
    return hidden


def _size(volume: np.ndarray) -> Size:
    depth, height, width = volume.shape
    return depth, height, width
