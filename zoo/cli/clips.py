"""What the commands on clips share: running a video tokenizer over clips, and writing clips to files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.models.video import VideoModel

SUFFIXES = (".gif", ".mp4", ".webm", ".png")
SHOWN = 8  # clips of `zoo reconstruct`


def load_split(args: argparse.Namespace) -> tuple[Any, Any]:
    """(data, source) of the clips that `--data --split --root` name.

    Raises:
        ZooError: no such data set or split, or one without clips.
    """
    from zoo import datamodules
    from zoo.cli.evaluate import SPLITS, data_section

    if args.split not in SPLITS:
        raise ZooError(f"unknown split '{args.split}'" + nearest(args.split, SPLITS))
    changes = [f"root={args.root}"] if args.root else []
    data: Any = datamodules.build(data_section(args.data, [*changes, *(args.set or [])]), None)
    data.setup()
    source = data.sources.get(args.split)
    if getattr(data, "modality", "") != "video" or not hasattr(source, "clip"):
        what = "holds no clips" if source is not None else f"has no {args.split} split"
        raise ZooError(f"data set '{args.data}' {what}")
    return data, source


def encode_clips(model: VideoModel, source: Any, batch: int, limit: int = 0) -> tuple[Tensor, Tensor]:
    """Ids int32 [N, T, H, W] and labels [N] of the clips of *source*, in its order; -1 where there is no class."""
    import numpy as np
    import torch

    count = min(limit, len(source)) if limit else len(source)
    ids, labels = [], []
    for start in range(0, count, batch):
        rows = source.batch(np.arange(start, min(start + batch, count)), 0, 0)
        pixels = torch.from_numpy(rows["pixels"])
        ids.append(model.encode(pixels).to(torch.int32))
        labels.append(torch.as_tensor(rows.get("labels", np.full(len(pixels), -1))))
    return torch.cat(ids), torch.cat(labels).long()


def tokenize(args: argparse.Namespace, model: VideoModel) -> int:
    """`zoo tokenize` for a video tokenizer: one file of ids [N, T, H, W] and labels [N]."""
    from zoo.cli.tokenize import _write

    if args.images or not args.data:
        raise ZooError("a video tokenizer takes the clips of a data set: --data NAME")
    if args.flip or args.shard_size:
        raise ZooError("--flip and --shard-size are for pictures")
    data, source = load_split(args)
    ids, labels = encode_clips(model, source, args.batch_size, args.limit)
    about = {
        "tokenizer": args.ref,
        "vocab_size": str(model.vocab_size),
        "classes": json.dumps(list(data.classes)),
        "names": json.dumps(list(source.names[: len(ids)])),
    }
    out = Path(args.out).expanduser()
    _write(out, ids, labels, about)
    print(f"{out}: {len(ids)} clips of {' x '.join(map(str, ids.shape[1:]))} ids out of {model.vocab_size}")
    return 0


def add_clip_options(command: Any) -> None:
    """Options of `zoo reconstruct` that only clips have."""
    group = command.add_argument_group("clips: video files or folders of frames, or --data")
    group.add_argument(
        "--frames", type=int, metavar="N", help="of a clip, from the middle of a video (default: 16 or 17)"
    )
    group.add_argument("--size", type=int, metavar="S", help="side of the frames (default: 128, or that of --data)")
    group.add_argument("--fps", type=float, default=8.0, metavar="F", help="of the file (default: 8)")


def reconstruct(args: argparse.Namespace, model: VideoModel) -> int:
    """`zoo reconstruct` for a video tokenizer: clips beside their reconstructions, and PSNR and SSIM of each frame.

    Raises:
        ZooError: no clip, a video of fewer frames than a clip, or options for pictures.
    """
    import numpy as np
    import torch

    from zoo.cli.common import table
    from zoo.nn.video_metrics import frame_psnr, frame_ssim

    if args.tokens is not None:
        raise ZooError("--tokens is for pictures: a video tokenizer decodes all of a clip's tokens")
    source = _clips_of(args, model)
    count = min(args.limit or len(source), len(source))
    shown: list[Tensor] = []
    scores: list[Tensor] = []
    for start in range(0, count, args.batch_size):
        pixels = source.batch(np.arange(start, min(start + args.batch_size, count)), 0, 0)["pixels"]
        real = torch.from_numpy(pixels)
        fake = model.decode(model.encode(real)).float().clamp(0, 1)
        small = min(real.shape[-2:]) < 11
        similar = torch.full(real.shape[:3:2], torch.nan) if small else frame_ssim(real, fake)
        scores.append(torch.stack([frame_psnr(real, fake), similar]))
        room = SHOWN - sum(len(part) for part in shown) // 2
        shown.append(torch.stack([real[:room], fake[:room]], 1).flatten(0, 1))
    save_clips(torch.cat(shown), args.out, args.fps, columns=2)
    means = torch.cat(scores, 1).mean(1)  # [2, T]
    rows = [(str(i + 1), f"{p:.2f}", f"{s:.4f}") for i, (p, s) in enumerate(means.T.tolist())]
    psnr, similar = means.mean(1).tolist()
    print(table([*rows, ("all", f"{psnr:.2f}", f"{similar:.4f}")], ("frame", "PSNR dB", "SSIM"), right=(0, 1, 2)))
    print(f"{args.out}: means over {count} clip{'s' * (count > 1)}, clamped to [0, 1], not rounded to 8 bits")
    return 0


def _clips_of(args: argparse.Namespace, model: VideoModel) -> Any:
    """The source of the clips that the arguments name."""
    from zoo import datamodules

    if args.batch_size < 1 or args.limit < 0:
        raise ZooError("--batch-size must be at least 1 and --limit must not be negative")
    if bool(args.images) == bool(args.data):
        raise ZooError("name video files or folders, or a data set with --data, and not both")
    if args.data:
        args.set = [f"{name}={value}" for name in ("frames", "size") if (value := getattr(args, name)) is not None]
        return load_split(args)[1]
    step = model.factor[0]
    frames = args.frames or step * max(1, 16 // step) + int(model.lone_first)
    files = [{"path": str(Path(text).expanduser().resolve())} for text in args.images]
    fields = {"frames": frames, "size": args.size or 128, "resize": "short", "strategy": "center"}
    data: Any = datamodules.build({"name": "videos", "test": files, **fields}, None)
    data.setup()
    source = data.sources["test"]
    for video in source.videos:
        if video.facts[0] < frames:
            raise ZooError(f"'{video.place}' has {video.facts[0]} frames, fewer than the {frames} of a clip (--frames)")
    return source


def save_clips(clips: Tensor, out: str | Path, fps: float = 8.0, columns: int = 4) -> None:
    """Write clips [N, 3, T, H, W] in [0, 1] side by side.

    `.gif`, `.mp4` and `.webm` show them on a grid of *columns*; `.png` lays each one's frames in a row.

    Raises:
        ZooError: another suffix, no such folder, or PyAV is missing for a video.
    """
    import numpy as np
    from PIL import Image

    path = Path(out).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ZooError(f"'{out}' must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ZooError(f"folder '{path.parent}' does not exist")
    pixels = (clips.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()  # [N, T, H, W, 3]
    count, frames, height, width, _ = pixels.shape
    if path.suffix.lower() == ".png":
        sheet = pixels.transpose(0, 2, 1, 3, 4).reshape(count * height, frames * width, 3)
        Image.fromarray(sheet).save(path)
        return
    rows = -(-count // columns)
    columns = min(columns, count)
    grid = np.zeros((rows * columns, frames, height, width, 3), np.uint8)
    grid[:count] = pixels
    grid = grid.reshape(rows, columns, frames, height, width, 3).transpose(2, 0, 3, 1, 4, 5)
    movie = np.ascontiguousarray(grid.reshape(frames, rows * height, columns * width, 3))
    if path.suffix.lower() == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in movie)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    from zoo.datamodules.videos import write_video

    write_video(movie, path, fps)
