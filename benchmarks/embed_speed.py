"""Vectors of 10,000 sequences of unlike lengths, against a padded loop in input order.

    python benchmarks/embed_speed.py [hyenadna dnabert2] [--threads 2] [--count 10000] [--low 50] [--high 1000]

Lengths are log-uniform; the text is random DNA. Both sides tokenise, run the same weights in float32 and average the
last hidden states over the real tokens. Ours is `zoo.train.embed.embed` with its defaults: batches of similar length
under a budget of tokens, and for DNABERT-2 no work on padding. The rival takes the sequences as they come, pads each
batch to its longest row and runs every position, attention with a mask, as scripts around `transformers` do; it gets
the faster of several batch sizes. The outputs of both are compared. Writes results/embed_speed.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, machine
from torch import Tensor

from zoo.hub.artifact import Artifact
from zoo.models.base import SequenceModel
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn import attention, masks
from zoo.nn.layout import Layout
from zoo.tokenizers import build
from zoo.tokenizers.bpe import train as train_bpe
from zoo.train.embed import Reader, embed

TARGET = 2.0
BATCHES = (8, 32, 128)


def sequences(count: int, low: int, high: int) -> list[str]:
    """Random DNA with log-uniform lengths."""
    draw = random.Random(0)
    lengths = [round(low * (high / low) ** draw.random()) for _ in range(count)]
    return ["".join(draw.choices("ACGT", k=length)) for length in lengths]


def artifact(name: str, texts: list[str], high: int, place: Path) -> Artifact:
    """An untrained model with its tokenizer."""
    torch.manual_seed(0)
    if name == "hyenadna":
        model: Any = HyenaDNA(HyenaDNAConfig(d_model=128, n_layer=2, max_len=high + 2))
        return Artifact(model.eval(), build({"name": "char"}), place, {})
    train_bpe(texts[:500], 1024, place / "tokenizer.json")
    tokenizer = build({"name": "bpe", "cls": "[CLS]", "sep": "[SEP]"}, place)
    sizes = {"d_model": 128, "n_layer": 4, "n_head": 4, "d_inner": 512}
    model = DNABERT2(DNABERT2Config(vocab_size=tokenizer.vocab_size, **sizes))
    return Artifact(model.eval(), tokenizer, place, {})


def padded(model: Any, ids: Tensor, valid: Tensor) -> Tensor:
    """Every position of every row through the model, attention with a dense mask."""
    layout, attend = Layout(model.layout_kind, valid=valid), attention.attend
    attention.attend = masks.attend_dense
    try:
        return SequenceModel.forward_features(model, ids, layout)[0]
    finally:
        attention.attend = attend


@torch.inference_mode()
def loop(reader: Reader, texts: list[str], batch: int) -> Tensor:
    """[N, D] means over real tokens, in input order."""
    out = []
    for start in range(0, len(texts), batch):
        ids, valid = reader.encode([text.encode() for text in texts[start : start + batch]])
        hidden = padded(reader.model, ids, valid)
        out.append((hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))
    return torch.cat(out)


def ours(reader: Reader, texts: list[str]) -> Tensor:
    found: Iterator[Any] = embed(reader, ((str(i), text) for i, text in enumerate(texts)))
    return torch.stack([torch.from_numpy(vector) for _, vector in found])


def seconds(fn: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = fn()
    return time.perf_counter() - start, out


def measure(name: str, texts: list[str], args: argparse.Namespace, place: Path) -> dict[str, Any]:
    found = artifact(name, texts, args.high, place)
    reader = Reader(found)
    ours(reader, texts[:64])
    few = texts[: max(len(texts) // 25, 1)]
    probe = {batch: seconds(lambda batch=batch: loop(reader, few, batch))[0] for batch in BATCHES}
    batch = min(probe, key=lambda size: probe[size])  # the rival's best
    best = {"ours": float("inf"), "loop": float("inf")}
    gap = 0.0
    for _ in range(args.repeats):
        taken, mine = seconds(lambda: ours(reader, texts))
        best["ours"] = min(best["ours"], taken)
        taken, other = seconds(lambda: loop(reader, texts, batch))
        best["loop"] = min(best["loop"], taken)
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
        gap = max(gap, float((mine - other).abs().max()))
    tokens = int(reader.tokenizer.counts([text.encode() for text in texts]).sum())
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "tokens": tokens,
        "loop_batch": batch,
        "ours_seconds": best["ours"],
        "loop_seconds": best["loop"],
        "ratio": best["loop"] / best["ours"],
        "largest_difference": gap,
    }
    print(f"{name}: ours {best['ours']:.1f} s, padded loop (batch {batch}) {best['loop']:.1f} s")
    print(f"ratio {row['ratio']:.2f} (target {TARGET}); largest difference {gap:.1e}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["hyenadna", "dnabert2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--low", type=int, default=50)
    parser.add_argument("--high", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = sequences(args.count, args.low, args.high)
    path = RESULTS / "embed_speed.json"
    known = {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            known[name] = measure(name, texts, args, Path(place))
        settings = {key: value for key, value in vars(args).items() if key != "models"}
        RESULTS.mkdir(exist_ok=True)
        about = {"machine": machine(), "target": TARGET, **settings, "rows": list(known.values())}
        path.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
