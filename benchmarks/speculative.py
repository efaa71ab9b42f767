"""Speculative decoding of a 26M genomic language model with the adjacency table as draft: gain and tokens a forward.

    python benchmarks/speculative.py --train 400 --weights runs/ecoli26m.pt     # seconds of training, once
    python benchmarks/speculative.py --weights runs/ecoli26m.pt [--threads 2]

The model is a GENERator of width 512 (12 layers, 8 query and 2 key heads, 6-mers), trained on the first 80% of the
genome of E. coli K-12 (datamodules/ecoli.yaml). Prompts come from the held-out tenth. Greedy outputs with and without
drafts must be equal token for token; sampling at temperature 1 is measured too. Writes results/speculative.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zoo import datamodules, tokenizers
from zoo.generate.draft import TokenTable
from zoo.generate.engine import GenerateConfig, generate
from zoo.models.generator import GENERator, GENERatorConfig

RESULTS = Path(__file__).parent / "results"
LENGTH = 256  # tokens a window


def config() -> GENERatorConfig:
    return GENERatorConfig(d_model=512, n_layer=12, n_head=8, n_kv_head=2, d_inner=768, max_len=4096)


def windows(split: str, batch: int) -> Any:
    tokenizer = tokenizers.build({"name": "kmer", "bos": False, "align": "left"})
    changes = {"length": 6 * LENGTH, "batch_size": batch, "shift": 6 * LENGTH, "rc_augment": True}
    data = datamodules.build(datamodules.section("ecoli", **changes), tokenizer, seed=0)
    data.setup("fit" if split == "train" else "test")
    return data.train_dataloader() if split == "train" else data.test_dataloader()


def train(seconds: float, file: Path) -> None:
    """Train for about *seconds* of wall time and save the weights and the losses."""
    torch.manual_seed(0)
    model = GENERator(config()).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, losses = time.perf_counter(), 0, []
    while (spent := time.perf_counter() - start) < seconds:
        for batch in windows("train", 8):
            spent = time.perf_counter() - start
            if spent >= seconds:
                break
            rate = min(1.0, (step + 1) / 20) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * spent / seconds))
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * rate
            ids = batch["ids"]
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            step += 1
            if step % 20 == 0:
                print(
                    f"step {step}  {spent:.0f} s  {sum(losses[-20:]) / 20 / math.log(2) / 6:.4f} bits a base",
                    flush=True,
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "losses": losses, "seconds": time.perf_counter() - start}, file)


@torch.inference_mode()
def measure(file: Path, new: int, prompts: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds a token with and without drafts (the prompt included), alternating, and tokens a forward pass."""
    model = GENERator(config()).eval()
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    ids = next(iter(windows("test", prompts)))["ids"]
    rows = []
    for name, options in {"greedy": {}, "temperature 1": {"temperature": 1.0}}.items():
        for budget in (4, 8, 12):
            cfg = GenerateConfig(max_new_tokens=new, ban=tuple(range(32)), draft_budget=budget, **options)
            plain, fast, equal, accepted = [], [], True, []
            for _ in range(repeats):
                table = TokenTable(model.config.vocab_size)
                spent = [0.0, 0.0]
                for row in ids:
                    start = clock()
                    without = generate(model, row[None], config=cfg)
                    middle = clock()
                    drafted = generate(model, row[None], config=cfg, draft=table)
                    spent[0] += middle - start
                    spent[1] += clock() - middle
                    equal &= torch.equal(without.ids, drafted.ids)
                    accepted += drafted.stats.accepted
                plain.append(spent[0])
                fast.append(spent[1])
            per = 1 + sum(accepted) / len(accepted)
            row = {"mode": name, "nodes": budget, "tokens_per_forward": round(per, 3)}
            row |= {"ms_plain": round(1e3 * min(plain) / (new * len(ids)), 3)}
            row |= {"ms_drafted": round(1e3 * min(fast) / (new * len(ids)), 3)}
            row |= {"gain": round(min(plain) / min(fast), 3)}
            if name == "greedy":
                row["output_identical"] = bool(equal)
            print(json.dumps(row), flush=True)
            rows.append(row)
    tail = saved["losses"][-10:]
    bits = sum(tail) / len(tail) / math.log(2) / 6
    trained = {"steps": len(saved["losses"]), "seconds": round(saved["seconds"]), "train_bits_per_base": round(bits, 4)}
    return {"model": "GENERator 26M, float32", "training": trained, "new": new, "prompts": prompts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=float, default=0)
    parser.add_argument("--weights", type=Path, default=Path("runs/ecoli26m.pt"))
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread, on a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.train:
        train(args.train, args.weights)
        return
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": args.clock}
    result |= measure(args.weights, args.new, args.prompts, args.repeats, clock)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speculative.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
