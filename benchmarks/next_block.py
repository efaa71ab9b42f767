"""Next-block against next-token prediction on moving digits: quality, steps, and frames a second with tokenizing.

Every row is one model of the same parameters, trained on the same tokens; only the block differs. All decode with a
key-value cache, one clip at a time: encode the given frames, generate the rest, decode the clip.

    python benchmarks/next_block.py --work runs/next_block tokens --tokenizer runs/nbp_tokenizer_moving_mnist/artifact
    python benchmarks/next_block.py --work runs/next_block train
    python benchmarks/next_block.py --work runs/next_block measure
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from _bench import RESULTS, machine

from zoo.cli.clips import encode_clips, save_clips
from zoo.datamodules import build, section
from zoo.datamodules.clip_tokens import read_clips
from zoo.generate.next_block import generate_blocks
from zoo.hub import artifact
from zoo.models.nbp import NBP
from zoo.nn.video_metrics import frame_psnr, frechet
from zoo.train.compose import compose
from zoo.train.recipe import validate

GIVEN = 2  # latent frames: five frames
BLOCKS = (1, 8, 16, 32, 64)


def clips_of(split: str, count: int) -> torch.Tensor:
    data = build(section("moving_mnist", frames=17, train=count, val=count), None)
    data.setup()
    return torch.from_numpy(data.sources[split].batch(np.arange(count), 0, 0)["pixels"])


def tokens(args: argparse.Namespace) -> None:
    """Tokenize the training and the validation clips."""
    from safetensors.torch import save_file

    model = artifact.load(args.tokenizer).model
    for split, count in (("train", args.train), ("val", args.val)):
        data = build(section("moving_mnist", train=args.train, val=args.val), None)
        data.setup()
        ids, labels = encode_clips(model, data.sources[split], 8, count)
        about = {"tokenizer": str(Path(args.tokenizer).resolve()), "vocab_size": str(model.vocab_size), "classes": "[]"}
        save_file({"ids": ids, "labels": labels}, args.work / f"{split}.safetensors", metadata=about)
        print(f"{split}: {list(ids.shape)}", flush=True)


def recipe(args: argparse.Namespace, block: int) -> list[str]:
    return [
        f"model.block={block}", f"data.root={args.work.resolve()}", f"trainer.max_steps={args.steps}",
        f"trainer.val_every={args.steps}", f"trainer.checkpoint_every={args.steps}",
    ]  # fmt: skip


def train(args: argparse.Namespace) -> None:
    """Train one model for each block, unless its artifact is there."""
    from zoo.train.run import train as run

    for block in args.blocks:
        out = args.work / f"block{block}"
        if not (out / "artifact").is_dir():
            composed = compose("nbp_moving_mnist", recipe(args, block))
            run(dataclasses.replace(validate(composed), name=f"nbp_block{block}"), out)


def model_of(args: argparse.Namespace, block: int) -> NBP:
    place = args.work / f"block{block}" / "artifact"
    if place.is_dir():
        return artifact.load(str(place)).model
    from zoo.train.assemble import build_model, model_config

    torch.manual_seed(0)
    return build_model("nbp", model_config(validate(compose("nbp_moving_mnist", recipe(args, block))).model)).eval()


@torch.inference_mode()
def timed(args: argparse.Namespace) -> dict[int, list[float]]:
    """Seconds for one clip of each model, in turns, tokenizing included."""
    tokenizer = artifact.load(args.tokenizer).model.eval()
    models = {block: model_of(args, block).eval() for block in args.blocks}
    clip = clips_of("val", 1)[:, :, : 1 + 4 * (GIVEN - 1)]
    seconds: dict[int, list[float]] = {block: [] for block in args.blocks}
    for _ in range(1 + args.repeats):
        for block, model in models.items():
            began = time.perf_counter()
            frames = tokenizer.encode(clip)
            found = generate_blocks(model, frames=frames, top_k=args.top_k, generator=torch.Generator().manual_seed(0))
            tokenizer.decode(found.codes)
            seconds[block].append(time.perf_counter() - began)
    return {block: values[1:] for block, values in seconds.items()}


@torch.inference_mode()
def quality(args: argparse.Namespace, block: int) -> dict[str, float]:
    """Errors of the likeliest continuation, and the distance of drawn ones from real clips."""
    tokenizer, model = artifact.load(args.tokenizer).model.eval(), model_of(args, block).eval()
    ids = torch.from_numpy(read_clips([args.work / "val.safetensors"]).ids)[: args.val]
    real = clips_of("val", args.val)[: len(ids)]
    given = 1 + 4 * (GIVEN - 1)
    likely = generate_blocks(model, frames=ids[:, :GIVEN], temperature=0).codes
    seen = tokenizer.decode(likely).clamp(0, 1)
    if block == 16:
        save_clips(torch.stack([real[:4], seen[:4]], 1).flatten(0, 1), args.work / "block16.png")
        save_clips(torch.cat([real[:4], seen[:4]]), args.work / "block16.gif")
    following = frame_psnr(real, seen)[:, given:]
    drawn = generate_blocks(
        model, frames=ids[:, :GIVEN], top_k=args.top_k, generator=torch.Generator().manual_seed(0)
    ).codes
    return {
        "psnr_next_frame": float(following[:, 0].mean()),
        "psnr_next_4": float(following[:, :4].mean()),
        "frechet": frechet(features(tokenizer, ids), features(tokenizer, drawn)),
        "code_accuracy": float((likely[:, GIVEN] == ids[:, GIVEN]).float().mean()),
    }


def features(tokenizer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[N, 48] means of the code vectors over quarters of each continued latent frame."""
    codes = tokenizer.quantizer.lookup(ids[:, GIVEN:]).movedim(-1, 2)  # [N, T, D, H, W]
    return torch.nn.functional.adaptive_avg_pool2d(codes.flatten(0, 1), 2).reshape(len(ids), -1)


def floors(args: argparse.Namespace) -> dict[str, float]:
    """What repeating the last given frame reaches, and the tokenizer alone."""
    ids = torch.from_numpy(read_clips([args.work / "val.safetensors"]).ids)[: args.val]
    real = clips_of("val", args.val)[: len(ids)]
    given = 1 + 4 * (GIVEN - 1)
    still = frame_psnr(real[:, :, given:], real[:, :, given - 1 : given].expand_as(real[:, :, given:]))
    with torch.inference_mode():
        coded = frame_psnr(real, artifact.load(args.tokenizer).model.eval().decode(ids).clamp(0, 1))[:, given:]
    return {
        "copy_last_next_frame": float(still[:, 0].mean()),
        "copy_last_next_4": float(still[:, :4].mean()),
        "tokenizer_next_4": float(coded[:, :4].mean()),
    }


def measure(args: argparse.Namespace) -> None:
    """Times always; quality where models were trained."""
    seconds = timed(args)
    first = min(seconds[args.blocks[0]])
    rows = []
    for block, values in seconds.items():
        best, model = min(values), model_of(args, block)
        steps = (int(model.order.numel()) - GIVEN * 64) // block
        row = {
            "block": block, "steps": steps, "seconds": best, "median_seconds": statistics.median(values),
            "frames_per_second": 12 / best, "speedup": first / best,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_steps": args.steps if (args.work / f"block{block}" / "artifact").is_dir() else 0,
        }  # fmt: skip
        rows.append(row | (quality(args, block) if row["trained_steps"] else {}))
        print(json.dumps(rows[-1]), flush=True)
    trained = any(row["trained_steps"] for row in rows)
    result = {"machine": machine(), "rows": rows, "floors": floors(args) if trained else {}}
    (RESULTS / "next_block.json").write_text(json.dumps(result, indent=1) + "\n")
    with (RESULTS / "next_block.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, result["floors"])


def plot(rows: list[dict], floor: dict[str, float]) -> None:
    """Speed, and quality where it was measured, against the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = [row["block"] for row in rows]
    panels = [("frames_per_second", "frames a second, tokenizing included")]
    if all("frechet" in row for row in rows):
        panels += [("psnr_next_4", "PSNR of the next four frames, dB"), ("frechet", "Frechet distance of codes")]
    _, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), squeeze=False)
    for axis, (name, label) in zip(axes[0], panels, strict=True):
        axis.plot(blocks, [row[name] for row in rows], "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(blocks, [str(b) for b in blocks])
        axis.set_xlabel("tokens a block (64: one latent frame)")
        axis.set_ylabel(label)
        if name == "psnr_next_4":
            axis.axhline(floor["copy_last_next_4"], linestyle="--", color="grey", label="last frame repeated")
            axis.legend()
    plt.tight_layout()
    plt.savefig(RESULTS / "next_block.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "train", "measure"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", default="runs/nbp_tokenizer_moving_mnist/artifact")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    {"tokens": tokens, "train": train, "measure": measure}[args.what](args)


if __name__ == "__main__":
    main()
