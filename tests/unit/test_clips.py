"""The choice of a clip's frames."""

from __future__ import annotations

import random

import numpy as np
import pytest

from zoo.datamodules.clips import clip_indices, resample
from zoo.errors import ZooError


def test_resampling_only_slows_down() -> None:
    assert resample(10, 25, -1).tolist() == list(range(10))
    assert resample(10, 25, 30).tolist() == list(range(10))
    assert resample(10, 20, 10).tolist() == [0, 2, 4, 6, 9]


@pytest.mark.parametrize("seed", range(20))
def test_random_windows_are_contiguous_and_cover_both_ends(seed: int) -> None:
    indices, mask = clip_indices(20, 17, strategy="rand", generator=random.Random(seed))
    assert np.array_equal(indices, np.arange(indices[0], indices[0] + 17))
    assert 0 <= indices[0] <= 3
    assert mask.all()


def test_every_window_is_drawn() -> None:
    source = random.Random(1)
    starts = {int(clip_indices(20, 17, strategy="rand", generator=source)[0][0]) for _ in range(200)}
    assert starts == {0, 1, 2, 3}


def test_centre_uniform_and_short_videos() -> None:
    assert clip_indices(10, 4, strategy="center")[0].tolist() == [3, 4, 5, 6]
    assert clip_indices(10, 4, strategy="uniform")[0].tolist() == [0, 3, 6, 9]
    indices, mask = clip_indices(3, 5, strategy="uniform")
    assert indices.tolist() == [0, 1, 2, -1, -1]
    assert mask.tolist() == [True, True, True, False, False]


def test_wrong_requests() -> None:
    with pytest.raises(ZooError, match="cannot be taken from a video of 0 frames"):
        clip_indices(0, 4)
    with pytest.raises(ZooError, match=r"unknown clip strategy 'centre' \(did you mean 'center'\?\)"):
        clip_indices(10, 4, strategy="centre")  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="needs a random generator"):
        clip_indices(10, 4, strategy="rand")
