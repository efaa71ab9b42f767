"""Clips from a next-block model: the video part of `zoo generate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact


def add_options(command: Any) -> None:
    """Options that only clips have; `--tokenizer`, `--guidance`, `--num`, `--top-k` and so on are shared."""
    group = command.add_argument_group("clips (NBP): a .gif, .mp4, .webm, or a .png with the frames of a clip in a row")
    group.add_argument("--continue", dest="data", metavar="DATA", help="data set whose first --num clips are continued")
    group.add_argument("--split", default="test", metavar="SPLIT", help="of --continue: train, val or test (default)")
    group.add_argument("--root", metavar="DIR", help="folder that holds the files of --continue")
    group.add_argument("--given", type=int, default=2, metavar="N", help="latent frames that are given (default: 2)")
    group.add_argument("--class", dest="number", type=int, metavar="N", help="class, of a model that takes one")
    group.add_argument("--fps", type=float, default=8.0, metavar="F", help="of the file (default: 8)")


def run(found: Artifact, args: argparse.Namespace) -> int:
    """Write clips, continued from given ones or made from nothing, to `args.out`."""
    import torch

    from zoo.cli.clips import encode_clips, load_split, save_clips
    from zoo.cli.generate_images import trained_on
    from zoo.cli.pictures import load_visual
    from zoo.generate.next_block import generate_blocks
    from zoo.models.video import VideoModel

    if args.out is None:
        raise ZooError("clips need a file: --out clips.gif")
    model: Any = found.model
    config = model.config
    ref = args.tokenizer or trained_on(found)
    _, tokenizer = load_visual(ref)
    if not isinstance(tokenizer, VideoModel):
        raise ZooError(f"'{ref}' holds a {type(tokenizer).__name__}, not a video tokenizer")
    if tokenizer.vocab_size != config.video_vocab:
        raise ZooError(f"the model makes {config.video_vocab} codes, but '{ref}' decodes {tokenizer.vocab_size}")
    frames = None
    if config.hybrid:
        if args.data:
            raise ZooError("this model begins each clip itself: leave --continue out")
    elif not args.data:
        raise ZooError("this model continues clips: name a data set with --continue")
    else:
        args.set = None
        ids, _ = encode_clips(tokenizer, load_split(args)[1], 8, args.num)
        if tuple(ids.shape[1:]) != tuple(config.grid):
            raise ZooError(
                f"the model makes clips of {list(config.grid)} tokens, those of --continue have {list(ids.shape[1:])}"
            )
        if not 1 <= args.given < config.grid[0]:
            raise ZooError(f"--given must lie between 1 and {config.grid[0] - 1}, got {args.given}")
        frames = ids[:, : args.given].long()
    cond = None
    if config.cond_tokens:
        if config.cond_tokens != 1 or args.number is None:
            raise ZooError(
                "this model takes a condition: give a class with --class (texts are for the Python interface)"
            )
        cond = torch.full((args.num, 1), args.number)
    made = generate_blocks(
        model,
        cond,
        frames,
        batch=args.num,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        guidance=args.guidance if cond is not None and args.guidance > 0 else 1.0,
        generator=torch.Generator().manual_seed(args.seed),
    )
    save_clips(tokenizer.decode(made.codes), args.out, args.fps)
    print(f"{args.out}: {len(made.codes)} clips, {made.steps} passes through the model")
    return 0
