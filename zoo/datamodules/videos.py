"""Clips from video files, read by PyAV, and from folders of frames."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.clips import Strategy, clip_indices
from zoo.datamodules.loader import Source
from zoo.datamodules.manifest import FileConfig, check, locate
from zoo.datamodules.pictures import SUFFIXES as PICTURES
from zoo.datamodules.pictures import open_rgb
from zoo.datamodules.settings import SplitFilesConfig
from zoo.errors import ZooError

VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v")


@config
class VideoDataConfig(SplitFilesConfig):
    """A set of videos.

    Attributes:
        root: folder that the paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: video files, or folders that hold videos or folders of frames, in one folder for each class
            or without classes.
        classes: names of the class folders; () takes those of the first split, if it has any.
        frames: of a clip.
        strategy: which frames of a video in training: a random window, the middle one, or evenly spread ones; other
            splits take the middle one where it is `rand`.
        fps: frames a second of a clip, -1 for the video's own; never more than that.
        frame_fps: frames a second of folders of frames.
        size: side of a clip's frames.
        resize: `both` sides to `size` whatever the aspect ratio (NBP), or the shorter one and a crop from the centre.
        clips_per_video: samples that one pass takes from each video; more than 1 needs `rand`.
        batch_size, eval_batch_size: clips a batch, in training and otherwise (None: the same).
    """

    classes: tuple[str, ...] = ()
    frames: int = 17
    strategy: Literal["rand", "center", "uniform"] = "rand"
    fps: float = -1.0
    frame_fps: float = 25.0
    size: int = 128
    resize: Literal["both", "short"] = "both"
    clips_per_video: int = 1
    batch_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.frames, self.size, self.clips_per_video) < 1:
            raise ValueError("frames, size and clips_per_video must be at least 1")
        if self.clips_per_video > 1 and self.strategy != "rand":
            raise ValueError(f"clips_per_video is {self.clips_per_video}, but '{self.strategy}' always takes the same")


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ZooError("video files are read by PyAV, which is not installed: pip install 'seqzoo[video]'") from None
    return av


def video_facts(path: Path) -> tuple[int, float]:
    """Number of frames and frames a second of a video file.

    Raises:
        ZooError: PyAV is missing, or the file is no readable video.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            return stream.frames or sum(1 for _ in container.decode(stream)), rate
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ZooError(f"'{path}' is not a readable video ({error})") from None


def read_frames(path: Path, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The frames *indices* of a video file as RGB [H, W, 3]; an index beyond the last frame gives the last one.

    Raises:
        ZooError: PyAV is missing, or the file is no readable video.
    """
    av = _av()
    wanted, found, last = set(indices.tolist()), {}, None
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                last = frame
                if len(found) == len(wanted):
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ZooError(f"'{path}' is not a readable video ({error})") from None
    if last is None:
        raise ZooError(f"'{path}' holds no frame")
    end = last.to_ndarray(format="rgb24")  # some files announce more frames than they hold
    return [found.get(int(i), end) for i in indices]


def write_video(frames: NDArray[np.uint8], path: Path, fps: float = 8.0) -> None:
    """Write [T, H, W, 3] as .mp4 (H.264) or .webm (VP9); odd sides lose a pixel, which these codecs ask for.

    Raises:
        ZooError: PyAV is missing, or another suffix.
    """
    av = _av()
    codec = {".mp4": "libx264", ".webm": "libvpx-vp9"}.get(path.suffix.lower())
    if codec is None:
        raise ZooError(f"'{path}' must end in .mp4 or .webm")
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=round(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[:, :height, :width]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


class Video:
    """One video: a file, or a folder of frames in the order of their names."""

    def __init__(self, place: Path, frame_fps: float) -> None:
        self.place = place
        self.pictures = sorted(f for f in place.iterdir() if f.suffix.lower() in PICTURES) if place.is_dir() else []
        self._facts = (len(self.pictures), frame_fps) if self.pictures else None

    @property
    def facts(self) -> tuple[int, float]:
        """Number of frames and frames a second."""
        if self._facts is None:
            self._facts = video_facts(self.place)
        return self._facts

    def read(self, indices: NDArray[np.int64]) -> list[Image.Image]:
        """Frames as RGB pictures."""
        if self.pictures:
            return [open_rgb(self.pictures[int(i)]) for i in indices]
        return [Image.fromarray(frame) for frame in read_frames(self.place, indices)]


def fit_frame(image: Image.Image, size: int, resize: str) -> NDArray[np.uint8]:
    """[size, size, 3] of a frame, bilinear."""
    width, height = image.size
    if resize == "both":
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


class VideoSource:
    """Batches `pixels` [B, 3, T, S, S] float32 in [0, 1], `labels` [B] (-1: no class) and `index` [B].

    A random window is a function of seed, pass and sample.
    """

    def __init__(self, videos: Sequence[Video], labels: Sequence[int], cfg: VideoDataConfig, seed: int) -> None:
        self.videos, self.cfg, self.seed = videos, cfg, seed
        self.labels = np.repeat(np.asarray(labels, np.int64), cfg.clips_per_video)
        self.names = [f"{video.place.name}-{k}" for video in videos for k in range(cfg.clips_per_video)]
        self.augment = False

    def __len__(self) -> int:
        return len(self.labels)

    def clip(self, index: int, epoch: int = 0) -> NDArray[np.uint8]:
        """[T, S, S, 3] of one sample; black where the video is too short."""
        cfg = self.cfg
        video = self.videos[index // cfg.clips_per_video]
        total, rate = video.facts
        several = cfg.clips_per_video > 1
        strategy: Strategy = "center" if cfg.strategy == "rand" and not (self.augment or several) else cfg.strategy
        draw = random.Random(f"{self.seed}-{epoch if self.augment else 0}-{index}")
        indices, real = clip_indices(total, cfg.frames, strategy=strategy, video_fps=rate, fps=cfg.fps, generator=draw)
        clip = np.zeros((cfg.frames, cfg.size, cfg.size, 3), np.uint8)
        for row, frame in zip(np.flatnonzero(real), video.read(indices[real]), strict=True):
            clip[row] = fit_frame(frame, cfg.size, cfg.resize)
        return clip

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        clips = np.stack([self.clip(int(i), epoch) for i in index]).transpose(0, 4, 1, 2, 3)
        pixels = np.ascontiguousarray(clips, np.float32) / np.float32(255)
        return {"pixels": pixels, "labels": self.labels[index], "index": index}


class VideoData(Data):
    """Datamodule of videos; see `VideoDataConfig`.

    Raises (in setup):
        ZooError: a file is missing or changed; a folder without videos, or with an unknown class.
    """

    Config: ClassVar[type] = VideoDataConfig
    config: VideoDataConfig
    needs_tokenizer: ClassVar[bool] = False
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("video_reconstruction",)
    modality: ClassVar[str] = "video"

    def __init__(self, config: VideoDataConfig, tokenizer: Any = None, seed: int = 0) -> None:
        super().__init__(config, None, seed)
        self._classes: tuple[str, ...] = config.classes

    def _files(self) -> list[FileConfig]:
        return [*self.config.train, *self.config.val, *self.config.test]

    def _load(self) -> dict[str, Source]:
        cfg = self.config
        sources: dict[str, Source] = {}
        for split in ("train", "val", "test"):
            videos: list[Video] = []
            labels: list[int] = []
            for file in getattr(cfg, split):
                place = check(file, cfg.root, folder=locate(file.path, cfg.root).is_dir())
                found = find_videos(place, cfg.frame_fps)
                names = [video.place.relative_to(place).parts[:-1] if place.is_dir() else () for video in found]
                if not self._classes:
                    self._classes = tuple(sorted({parts[0] for parts in names if parts}))
                for video, parts in zip(found, names, strict=True):
                    if self._classes and parts and parts[0] not in self._classes:
                        raise ZooError(f"'{video.place}' lies in none of the class folders {', '.join(self._classes)}")
                    videos.append(video)
                    labels.append(self._classes.index(parts[0]) if parts else -1)
            if videos:
                sources[split] = VideoSource(videos, labels, cfg, self.seed)
        return sources

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def num_outputs(self) -> int:
        return len(self._classes)

    @property
    def max_tokens(self) -> int:
        return 1


def find_videos(place: Path, frame_fps: float) -> list[Video]:
    """The videos at or below *place*, sorted by path: files, and folders that hold pictures themselves.

    Raises:
        ZooError: none there.
    """
    if place.is_file():
        return [Video(place, frame_fps)]
    files = [f for f in place.rglob("*") if f.suffix.lower() in VIDEOS]
    folders = {f.parent for f in place.rglob("*") if f.suffix.lower() in PICTURES}
    found = sorted([*files, *folders])
    if not found:
        raise ZooError(f"'{place}' holds no video ({', '.join(VIDEOS)}) and no folder of frames")
    return [Video(f, frame_fps) for f in found]
