"""`zoo reconstruct`: pictures or clips beside what a tokenizer makes of them, for one or several numbers of tokens."""

from __future__ import annotations

import argparse

from zoo.cli.clips import add_clip_options
from zoo.cli.clips import reconstruct as reconstruct_clips
from zoo.cli.common import Parser, table
from zoo.cli.pictures import add_decode_options, add_source_options, decode, find, grid, load_visual, save_image
from zoo.errors import ZooError

SHOWN = 16  # rows of the sheet


def parser() -> Parser:
    command = Parser(
        "reconstruct",
        "Encode and decode pictures or clips, write a sheet of originals and reconstructions, and print PSNR and SSIM, "
        "of clips for each frame. For FlexTok the number of tokens is swept: 1, 2, 4, ... up to all.",
        [
            "zoo reconstruct runs/titok_emoji64/artifact --data emoji64 --limit 8 -o sheet.png",
            "zoo reconstruct runs/flextok_emoji64/artifact cat.png -o sheet.png --tokens 1,4,16 --steps 1 --guidance 1",
            "zoo reconstruct runs/nbp_tokenizer_moving_mnist/artifact street.mp4 --size 64 -o street.gif",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    add_source_options(command)
    command.add_argument(
        "-o", "--out", metavar="FILE", required=True, help=f"PNG of the first {SHOWN} pictures; clips: also .gif, .mp4"
    )
    command.add_argument("--tokens", metavar="K,...", help="numbers of tokens (FlexTok; default: 1, 2, 4, ... all)")
    add_decode_options(command)
    add_clip_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    import torch

    from zoo.models.video import VideoModel
    from zoo.nn.image_metrics import psnr, ssim

    _, model = load_visual(args.ref)
    if isinstance(model, VideoModel):
        return reconstruct_clips(args, model)
    pictures = find(args)
    counts = token_counts(args.tokens, model.num_tokens, sweep=model.ordered)
    scores: dict[int, list[tuple[float, float]]] = {k: [] for k in counts}
    columns: list[list[torch.Tensor]] = [[] for _ in range(len(counts) + 1)]
    for pixels in pictures.batches(model.config.preprocess, args.batch_size):
        ids = model.encode(pixels)
        room = SHOWN - sum(len(part) for part in columns[0])
        columns[0].append(pixels[:room])
        for column, k in zip(columns[1:], counts, strict=True):
            output = decode(model, ids[:, :k], args)
            column.append(output[:room])
            similar = ssim(output, pixels) if pixels.shape[-1] >= 11 else torch.full((len(pixels),), float("nan"))
            scores[k] += zip(psnr(output, pixels).tolist(), similar.tolist(), strict=True)
    titles = ["original", *(f"{k} token{'s' * (k > 1)}" for k in counts)]
    save_image(grid([torch.cat(column) for column in columns], titles), args.out)
    rows = [
        (k, *(f"{sum(v) / len(v):.{n}f}" for v, n in zip(zip(*scores[k], strict=True), (2, 4), strict=True)))
        for k in counts
    ]
    print(table(rows, ("tokens", "PSNR dB", "SSIM"), right=(0, 1, 2)))
    print(f"{args.out}: means over {len(pictures.names)} pictures, clamped to [0, 1], not rounded to 8 bits")
    return 0


def token_counts(text: str | None, most: int, sweep: bool) -> list[int]:
    """The numbers of tokens that `--tokens` lists, or powers of two and all; all alone where there is no order.

    Raises:
        ZooError: not a list of numbers from 1 to *most*.
    """
    if text is None:
        powers = [2**i for i in range(most.bit_length()) if 2**i < most]
        return [*(powers if sweep else ()), most]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= k <= most for k in counts):
        raise ZooError(f"--tokens takes numbers from 1 to {most}, separated by commas, got '{text}'")
    return counts
