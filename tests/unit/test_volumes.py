"""Inputs and targets of pretraining on volumes."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.datamodules.volumes import hide_random, keep_prefix, patch_slices
from zoo.errors import ZooError

VOLUME = np.arange(1, 4 * 8 * 8 + 1, dtype=np.float32).reshape(4, 8, 8)
PATCH = (2, 4, 4)


@pytest.mark.parametrize("seed", range(8))
def test_prefixes_keep_the_first_patches(seed: int) -> None:
    made = keep_prefix(VOLUME, PATCH, np.random.RandomState(seed))
    places = patch_slices((4, 8, 8), PATCH)
    assert 1 <= made.count < len(places) == 8
    kept = [bool((made.input[place] == VOLUME[place]).all()) for place in places]
    assert kept == [i < made.count for i in range(8)]
    assert np.array_equal(made.next_patch, VOLUME[places[made.count]])
    noisy = keep_prefix(VOLUME, PATCH, np.random.RandomState(seed), None)
    assert noisy.count == made.count
    assert noisy.input.dtype == np.float32
    assert (noisy.input[places[-1]] != 0).all()


def test_random_patches() -> None:
    hidden = hide_random(VOLUME, PATCH, np.random.RandomState(0), 0.5)
    assert int((hidden == 0).sum()) == VOLUME.size // 2
    assert VOLUME.min() == 1, "the volume itself is left alone"


def test_patches_must_tile() -> None:
    with pytest.raises(ZooError, match="do not tile"):
        patch_slices((4, 8, 8), (3, 4, 4))
