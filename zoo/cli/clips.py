"""What the commands on clips share: running a video tokenizer over a data set, and writing clips to files."""

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
