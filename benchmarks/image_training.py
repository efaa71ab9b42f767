"""What trained visual tokenizers and generators reach on small real pictures, against floors of equally many bits.

    zoo train titok_digits; zoo train flextok_digits; ...        (the recipes say the rest)
    python benchmarks/image_training.py digits [--root FOLDER] [--runs runs] [--sheets FOLDER]

On the test split, PSNR in dB, mean over pictures, clamped to [0, 1], not rounded:

1. Floors: PCA of the training pictures with its coefficients rounded to 8 bits; the same number of bits spread over
   the coefficients by reverse water-filling with Lloyd-Max levels, a far better coder than any published floor; and
   box-shrunk pictures of 8 bits a value, enlarged bicubically.
2. TiTok with all its tokens, and with only the first of them, which it never saw in training: the others left out, or
   each at its mean code over the training pictures, whichever is better.
3. FlexTok with 1, 2, 4, ... tokens and without guidance, by the number of Euler steps: one gives the mean of the
   pictures that the tokens allow, many give a draw of them.
4. MaskGIT and autoregressive samples on TiTok's tokens: how often a small CNN trained on real pictures sees the class
   that was asked for, beside its accuracy on real test pictures and on reconstructed ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import datamodules
from zoo.cli import generate_images
from zoo.cli.pictures import grid
from zoo.hub import artifact
from zoo.nn.codebook import codebook_usage
from zoo.nn.flow import Guidance
from zoo.nn.image_metrics import psnr

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 4, 20)
SAMPLES = 50  # of each class


def load(name: str, root: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> pixels [N, 3, S, S] and labels [N]."""
    data: Any = datamodules.build(datamodules.section(name, **({"root": root} if root else {})), None)
    data.setup()
    out = {}
    for split, source in data.sources.items():
        batch = source.batch(np.arange(len(source)), 0, 0)
        out[split] = torch.from_numpy(batch["pixels"]), torch.from_numpy(batch["labels"])
    return out


def score(output: Tensor, pixels: Tensor) -> float:
    """Mean PSNR."""
    return round(float(psnr(output.clamp(0, 1), pixels).mean()), 2)


class PCA:
    """Principal components of training pictures, as a coder of a given number of bits."""

    def __init__(self, pixels: Tensor, most: int = 1024) -> None:
        x = pixels.flatten(1).float()
        self.mean = x.mean(0)
        x = x - self.mean
        values, vectors = torch.linalg.eigh(x @ x.T)  # fewer pictures than pixels
        order = values.argsort(descending=True)[: min(most, int((values > values.max() * 1e-6).sum()))]
        self.basis = (x.T @ vectors[:, order]) / values[order].sqrt()  # [pixels, components]
        self.train = x @ self.basis
        self.variance = values[order] / len(x)

    def decode(self, coefficients: Tensor, shape: torch.Size) -> Tensor:
        return (self.mean + coefficients @ self.basis[:, : coefficients.shape[1]].T).reshape(shape)

    def plain(self, pixels: Tensor, bits: int) -> Tensor:
        """bits / 8 components of 8 bits each, uniform over the training range."""
        count = max(1, min(bits // 8, self.basis.shape[1]))
        c = (pixels.flatten(1) - self.mean) @ self.basis[:, :count]
        low, high = self.train[:, :count].amin(0), self.train[:, :count].amax(0)
        level = ((c.clamp(low, high) - low) / (high - low) * 255).round()
        return self.decode(low + level / 255 * (high - low), pixels.shape)

    def allocated(self, pixels: Tensor, bits: int) -> Tensor:
        """Each bit goes to the component with the largest remaining error."""
        left, share = self.variance.clone(), torch.zeros(len(self.variance), dtype=torch.long)
        for _ in range(bits):
            worst = int(left.argmax())
            share[worst] += 1
            left[worst] /= 2.75 if share[worst] == 1 else 4  # a Gaussian's first bit gains less than the next ones
        c = (pixels.flatten(1) - self.mean) @ self.basis
        out = torch.zeros_like(c)
        for i in share.nonzero().flatten().tolist():
            levels = lloyd_max(self.train[:, i], int(2 ** share[i]))
            out[:, i] = levels[torch.bucketize(c[:, i], (levels[1:] + levels[:-1]) / 2)]
        return self.decode(out, pixels.shape)


def lloyd_max(values: Tensor, count: int, rounds: int = 30) -> Tensor:
    """*count* levels with the least squared error over *values*."""
    levels = torch.quantile(values, (torch.arange(count) + 0.5) / count)
    for _ in range(rounds):
        place = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        sums, counts = torch.zeros(count).index_add_(0, place, values), torch.bincount(place, minlength=count)
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels).sort().values
    return levels


def shrunk(pixels: Tensor, bits: int) -> Tensor:
    """Box-shrunk to the largest side whose 8-bit values fit, then enlarged."""
    side = max(1, int((bits / 24) ** 0.5))
    small = (F.adaptive_avg_pool2d(pixels, side) * 255).round() / 255
    return F.interpolate(small, size=pixels.shape[-2:], mode="bicubic", align_corners=False)


def batched(function: Any, ids: Tensor, size: int = 64) -> Tensor:
    return torch.cat([function(part) for part in ids.split(size)])


def tokenizers(data: dict[str, Any], runs: Path, name: str, results: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Floors, TiTok and FlexTok; the columns of a sheet."""
    test = data["test"][0]
    columns = [("original", test)]
    pca = PCA(data["train"][0])
    place = runs / f"titok_{name}" / "artifact"
    if place.is_dir():
        model: Any = artifact.load(place).model
        k, bits = model.num_tokens, float(np.log2(model.vocab_size))
        ids = batched(model.encode, test)
        every = torch.cat([ids, *(batched(model.encode, data[s][0]) for s in data if s != "test")])
        budget = round(k * bits)
        output = batched(model.decode, ids)
        results["titok"] = {"tokens": k, "bits": budget, "psnr": score(output, test)}
        mean = model.quantizer.lookup(batched(model.encode, data["train"][0])).float().mean(0)
        results["titok"]["first tokens only"] = {n: score(*few(model, ids, n, mean, test)) for n in powers(k)[:-1]}
        results["titok"]["codes used"] = {
            "test": round(codebook_usage(ids, model.vocab_size)["usage"], 4),
            "all pictures": round(codebook_usage(every, model.vocab_size)["usage"], 4),
        }
        results["floors at titok's bits"] = floors(pca, test, budget)
        columns.append((f"TiTok {k}", output))
    place = runs / f"flextok_{name}" / "artifact"
    if place.is_dir():
        model = artifact.load(place).model
        k, bits = model.num_tokens, float(np.log2(model.vocab_size))
        ids = batched(model.encode, test)
        every = torch.cat([ids, *(batched(model.encode, data[s][0]) for s in data if s != "test")])
        out: dict[str, Any] = {"tokens": k, "bits": round(k * bits), "psnr": {}, "floors": {}}
        for n in powers(k):
            for steps in STEPS:
                source = torch.Generator().manual_seed(0)
                decode = lambda part, n=n, steps=steps, source=source: model.decode(
                    part[:, :n], steps=steps, guidance=Guidance(), generator=source
                )
                output = batched(decode, ids)
                out["psnr"].setdefault(f"steps {steps}", {})[n] = score(output, test)
                if steps == 1:
                    columns.append((f"FlexTok {n}", output))
            out["floors"][n] = floors(pca, test, round(n * bits))
        columns.append((f"{STEPS[-1]} steps", output))
        out["codes used"] = {
            "test": round(codebook_usage(ids, model.vocab_size)["usage"], 4),
            "all pictures": round(codebook_usage(every, model.vocab_size)["usage"], 4),
        }
        results["flextok"] = out
    return columns


def few(model: Any, ids: Tensor, n: int, mean: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures of the first *n* tokens, the rest left out or at its mean, whichever is nearer to *test*."""
    codes = model.quantizer.lookup(ids[:, :n]).float()
    filled = torch.cat([codes, mean[n:].expand(len(ids), -1, -1)], 1)
    outputs = [batched(model.decode_latents, latents) for latents in (codes, filled)]
    return max(outputs, key=lambda output: score(output, test)), test


def powers(most: int) -> list[int]:
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def floors(pca: PCA, test: Tensor, bits: int) -> dict[str, float]:
    """PSNR of three plain coders at *bits* bits a picture."""
    side = max(1, int((bits / 24) ** 0.5))
    return {
        "PCA, 8 bits a component": score(pca.plain(test, bits), test),
        "PCA, bits allocated": score(pca.allocated(test, bits), test),
        f"shrunk to {side} ({side * side * 24} bits)": score(shrunk(test, bits), test),
    }


def classifier(data: dict[str, Any], classes: int, epochs: int) -> nn.Module:
    """A small CNN trained on real pictures, mirrored (but digits) and shifted."""
    torch.manual_seed(0)
    pixels, labels = data["train"]
    size = pixels.shape[-1]
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(((3, 32), (32, 64), (64, 128))):
        stride = 1 if i == 0 and size <= 32 else 2
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.BatchNorm2d(outer), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(2048, classes))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = len(pixels) // 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    reach = size // 16
    for _ in range(epochs):
        for part in torch.randperm(len(pixels)).split(64)[:steps]:
            x = F.pad(pixels[part], [reach] * 4, mode="replicate")
            top, left = torch.randint(2 * reach + 1, (2,)).tolist()
            x = x[:, :, top : top + size, left : left + size]
            if size > 32 and torch.rand(()) < 0.5:
                x = x.flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels[part]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def right(net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Accuracy in %."""
    return round(100 * float((batched(net, pixels).argmax(1) == labels).float().mean()), 1)


def generators(data: dict[str, Any], runs: Path, name: str, results: dict[str, Any], epochs: int) -> dict[str, Tensor]:
    """Class conditioning of the generators; samples [classes, n, ...] for the sheets."""
    found = {kind: runs / f"{kind}_{name}" / "artifact" for kind in ("maskgit", "rar")}
    found = {kind: place for kind, place in found.items() if place.is_dir()}
    if not found:
        return {}
    tokenizer: Any = artifact.load(runs / f"titok_{name}" / "artifact").model
    test, labels = data["test"]
    classes = int(data["train"][1].max()) + 1
    with torch.enable_grad():
        net = classifier(data, classes, epochs)
    rebuilt = batched(tokenizer.decode, batched(tokenizer.encode, test)).clamp(0, 1)
    wanted = torch.arange(classes).repeat(SAMPLES)
    report: dict[str, Any] = {
        "chance, %": round(100 / classes, 1),
        "real test pictures, %": right(net, test, labels),
        "reconstructed test pictures, %": right(net, rebuilt, labels),
    }
    samples = {}
    for kind, place in found.items():
        model = artifact.load(place).model
        for guidance in (0.0, 1.0, 3.0):
            ids = generate_images.sample(model, wanted, 0, steps=8, guidance=guidance)
            pixels = batched(tokenizer.decode, ids).clamp(0, 1)
            report[f"{kind}, guidance {guidance:g}, {len(wanted)} samples, %"] = right(net, pixels, wanted)
            if guidance == 1:
                samples[kind] = pixels.unflatten(0, (SAMPLES, classes))
    results["class seen by a CNN"] = report
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="digits, emoji64 or clothing64")
    parser.add_argument("--root", help="folder of the pictures, where they are not shipped")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the trained runs")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of reconstructions and samples")
    parser.add_argument("--epochs", type=int, default=15, help="of the CNN")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args.data, args.root)
    results: dict[str, Any] = {"pictures": {split: len(pair[0]) for split, pair in data.items()}}
    with torch.no_grad():
        columns = tokenizers(data, args.runs, args.data, results)
        samples = generators(data, args.runs, args.data, results, args.epochs)
    for kind in ("titok", "flextok", "maskgit", "rar"):
        file = args.runs / f"{kind}_{args.data}" / "artifact" / "run.json"
        if file.is_file():
            run = json.loads(file.read_text(encoding="utf-8"))
            results.setdefault("runs", {})[kind] = {
                "steps": run["steps"], "parameters": run["parameters"],
                "seconds on a shared CPU": run["timing"]["train_seconds"], "metrics": run["metrics"],
            }  # fmt: skip
    if args.sheets is not None:
        args.sheets.mkdir(parents=True, exist_ok=True)
        grid([pixels[:12].clamp(0, 1) for _, pixels in columns], [title for title, _ in columns]).quantize(256).save(
            args.sheets / f"{args.data}_reconstructions.png", optimize=True
        )
        for kind, pixels in samples.items():
            sheet = grid([pixels[:6, i] for i in range(pixels.shape[1])]).quantize(256)
            sheet.save(args.sheets / f"{args.data}_{kind}.png", optimize=True)
    print(json.dumps(results, indent=2))
    file = RESULTS / "image_training.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, args.data: results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
