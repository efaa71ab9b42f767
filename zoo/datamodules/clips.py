"""Which frames of a video make a clip: resampling in time, choice of a window, and padding of short videos.

Pure functions of numbers, equal to the reader of Ren et al. 2025 (NBP, arXiv 2502.07737), `load_video_from_path`.
"""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from zoo.errors import ZooError, nearest

Strategy = Literal["rand", "center", "uniform"]
STRATEGIES = ("rand", "center", "uniform")


def resample(total: int, video_fps: float, fps: float) -> np.ndarray:
    """Indices of a video's *total* frames at *fps* instead of *video_fps*, int64; all frames where fps is not below it
    or not positive. Evenly spaced over the whole video, cut to integers."""
    if fps <= 0 or video_fps <= fps:
        return np.arange(total, dtype=np.int64)
    return np.linspace(0, total - 1, int(total / video_fps * fps)).astype(np.int64)


def clip_indices(
    total: int,
    frames: int,
    *,
    strategy: Strategy = "center",
    video_fps: float = 25.0,
    fps: float = -1,
    generator: random.Random | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a clip and which of them are real.

    Args:
        total: frames of the video.
        frames: frames of the clip.
        strategy: `rand`: a contiguous window of the resampled frames, drawn from *generator*; `center`: the middle
            one; `uniform`: evenly spaced over all of them.
        video_fps: frames a second of the video.
        fps: frames a second of the clip; -1 keeps the video's. It is never raised.
        generator: needed for `rand`.

    Returns:
        Indices [frames] int64, -1 for the padding behind a short video (its frames are black), and a mask [frames]
        bool, True for real frames.

    Raises:
        ZooError: an empty video, a clip without frames, an unknown strategy, or `rand` without a generator.
    """
    if total < 1 or frames < 1:
        raise ZooError(f"a clip of {frames} frames cannot be taken from a video of {total} frames")
    if strategy not in STRATEGIES:
        raise ZooError(f"unknown clip strategy '{strategy}'{nearest(strategy, STRATEGIES)}")
    places = resample(total, video_fps, fps)
    count = len(places)
    if count <= frames:
        chosen = places
    elif strategy == "rand":
        if generator is None:
            raise ZooError("the clip strategy 'rand' needs a random generator")
        start = generator.randint(0, count - frames)
        chosen = places[start : start + frames]
    elif strategy == "center":
        start = count // 2 - frames // 2
        chosen = places[start : start + frames]
    else:
        chosen = places[np.linspace(0, count - 1, frames).astype(np.int64)]
    padding = np.full(frames - len(chosen), -1, dtype=np.int64)
    indices = np.concatenate([chosen, padding])
    return indices, indices >= 0
