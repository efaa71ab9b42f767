"""`zoo tokenize`: pictures to ids, in safetensors files that training reads (data name `tokens`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zoo.cli.common import Parser
from zoo.cli.pictures import add_source_options, find, load_visual
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "tokenize",
        "Turn pictures or clips into ids with a visual tokenizer. The file holds labels and ids: [N, K] of pictures "
        "(with --flip [N, 2, K]), [N, T, H, W] of clips.",
        [
            "zoo tokenize runs/titok_emoji64/artifact cat.png dog.jpg -o ids.safetensors",
            "zoo tokenize runs/titok_emoji64/artifact --data emoji64 --split train --flip -o train.safetensors",
            "zoo tokenize runs/nbp_tokenizer_moving_mnist/artifact --data moving_mnist -o clips.safetensors",
            "zoo tokenize titok-s128 photos/ -o ids.safetensors --shard-size 10000",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    add_source_options(command)
    command.add_argument("-o", "--out", metavar="FILE", required=True, help="safetensors file to write")
    command.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="change a field of a video --data, as in frames=17"
    )
    command.add_argument("--flip", action="store_true", help="also store the ids of each mirrored picture")
    command.add_argument(
        "--shard-size", type=int, default=0, metavar="N", help="pictures a file; FILE-00000.safetensors and so on"
    )
    return command


def run(args: argparse.Namespace) -> int:
    out = Path(args.out).expanduser()
    if out.suffix != ".safetensors":
        raise ZooError(f"'{args.out}' must end in .safetensors")
    if not out.parent.is_dir():
        raise ZooError(f"folder '{out.parent}' does not exist")
    if args.shard_size < 0:
        raise ZooError("--shard-size must not be negative")
    import torch

    from zoo.models.video import VideoModel

    _, model = load_visual(args.ref)
    if isinstance(model, VideoModel):
        from zoo.cli import clips

        return clips.tokenize(args, model)
    pictures = find(args)
    about = {
        "tokenizer": args.ref,
        "vocab_size": str(model.vocab_size),
        "classes": json.dumps(list(pictures.classes)),
    }
    total, size = len(pictures.names), args.shard_size or len(pictures.names)
    rows: list[Any] = []
    done = shard = 0
    for pixels in pictures.batches(model.config.preprocess, args.batch_size):
        ids = model.encode(pixels)
        if args.flip:
            ids = torch.stack([ids, model.encode(pixels.flip(-1))], 1)  # [B, 2, K]
        rows.extend(ids.to(torch.int32))
        while len(rows) >= size or (len(rows) + done == total and rows):
            part, rows = rows[:size], rows[size:]
            place = out.with_name(f"{out.stem}-{shard:05d}.safetensors") if args.shard_size else out
            stop = done + len(part)
            names = json.dumps(pictures.names[done:stop])
            _write(place, torch.stack(part), torch.tensor(pictures.labels[done:stop]), {**about, "names": names})
            print(f"{place}: {len(part)} pictures of {ids.shape[-1]} ids out of {model.vocab_size}")
            done, shard = stop, shard + 1
    return 0


def _write(place: Path, ids: Any, labels: Any, about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = place.with_name(f".{place.name}.partial")
    try:
        save_file({"ids": ids, "labels": labels}, temporary, metadata=about)
        temporary.replace(place)
    except OSError as error:
        raise ZooError(f"cannot write '{place}': {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
