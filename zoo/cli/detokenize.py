"""`zoo detokenize`: ids back to pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.cli.common import Parser, existing_file
from zoo.cli.pictures import add_decode_options, decode, grid, load_visual, save_image, to_image
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "detokenize",
        "Turn the ids of a token file into pictures: one PNG each in a folder, or one grid where --out ends in .png.",
        [
            "zoo detokenize runs/titok_emoji64/artifact ids.safetensors -o pictures/",
            "zoo detokenize runs/flextok_emoji64/artifact ids.safetensors -o grid.png --tokens 4",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_argument("file", metavar="IDS", help="safetensors file of `zoo tokenize`")
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder, or a file that ends in .png")
    command.add_argument("--tokens", type=int, default=0, metavar="K", help="use only the first K ids (FlexTok)")
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N pictures")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    add_decode_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    file = existing_file(args.file, "token file")
    import torch

    from zoo.datamodules.token_cache import read_cache

    cache = read_cache([file])
    _, model = load_visual(args.ref)
    if model.vocab_size != cache.vocab:
        raise ZooError(f"'{args.file}' holds ids out of {cache.vocab}, but '{args.ref}' has {model.vocab_size}")
    ids = torch.from_numpy(cache.ids[:, 0])[: args.limit or None]
    if not 0 <= args.tokens <= ids.shape[1]:
        raise ZooError(f"--tokens must be 1 to {ids.shape[1]}, got {args.tokens}")
    ids = ids[:, : args.tokens or None]
    pixels = torch.cat([decode(model, part, args) for part in ids.split(max(args.batch_size, 1))])
    if args.out.lower().endswith(".png"):
        save_image(grid(square(pixels)), args.out)
        print(f"{args.out}: {len(pixels)} pictures")
        return 0
    folder = Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    width = len(str(len(pixels)))
    for number, (name, picture) in enumerate(zip(_names(file, len(pixels)), pixels, strict=True)):
        stem = PurePosixPath(name).stem
        to_image(picture).save(folder / (f"{number:0{width}d}-{stem}.png" if stem else f"{number:0{width}d}.png"))
    print(f"{folder}: {len(pixels)} pictures")
    return 0


def square(pixels: Any) -> list[Any]:
    """Pictures [N, 3, H, W] as the columns of an about square sheet, read row by row."""
    columns = max(1, round(len(pixels) ** 0.5))
    return [pixels[i::columns] for i in range(columns) if i < len(pixels)]


def _names(file: Path, count: int) -> list[str]:
    """The names that the file gives its pictures; only their last part is used, as a file's name."""
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        names = json.loads((stored.metadata() or {}).get("names", "[]"))
    return [str(name) for name in names[:count]] if len(names) >= count else [""] * count
