"""Speculative decoding of a 26M genomic language model with tables as drafts: gain and tokens a forward pass.

    python benchmarks/speculative.py --train 900 --weights runs/ecoli26m.pt   # processor seconds; again to go on
    python benchmarks/speculative.py --weights runs/ecoli26m.pt [--unit base|6-mer] [--threads 2]

The model is a GENERator of width 512 over single bases (14 layers) or 6-mers (12 layers), trained on the first 80% of
the genome of E. coli K-12 (datamodules/ecoli.yaml). Prompts of 128 tokens come from the held-out tenth. Drafts are
Token Recycling's fixed trees and a table by contexts whose trees are as large as they repay, by the cost of a pass with
n guesses measured first. Greedy outputs with and without drafts must be equal token for token; sampling at temperature
1 is measured too, where equal laws need not give equal tokens. Writes results/speculative.json.
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
from zoo.generate.contexts import ContextTable
from zoo.generate.draft import DraftStrategy, TokenTable
from zoo.generate.engine import GenerateConfig, generate
from zoo.generate.target import ModelTarget
from zoo.models.generator import GENERator, GENERatorConfig

RESULTS = Path(__file__).parent / "results"
BASES = {"base": 1, "6-mer": 6}  # in a token
LENGTH = {"base": 256, "6-mer": 256}  # tokens a window
BATCH = 2  # windows a step: few minutes of training are better spent on many steps


def config(unit: str) -> GENERatorConfig:
    """26 million parameters of either unit: what single bases save in the embedding goes into two more layers."""
    layers, vocab = (14, 16) if unit == "base" else (12, 4128)
    sizes = {"d_model": 512, "n_head": 8, "n_kv_head": 2, "d_inner": 768, "max_len": 4096}
    return GENERatorConfig(n_layer=layers, vocab_size=vocab, **sizes)


def windows(unit: str, split: str, batch: int, seed: int = 0) -> Any:
    kmer = {"name": "kmer", "bos": False, "align": "left"}
    tokenizer = tokenizers.build(kmer if unit == "6-mer" else {"name": "char", "template": "none"})
    bases = BASES[unit] * LENGTH[unit]
    changes = {"length": bases, "batch_size": batch, "shift": bases, "rc_augment": True}
    data = datamodules.build(datamodules.section("ecoli", **changes), tokenizer, seed=seed)
    data.setup("fit" if split == "train" else "test")
    return data.train_dataloader() if split == "train" else data.test_dataloader()


def train(unit: str, seconds: float, part: float, file: Path) -> None:
    """Train for *seconds* of processor time in bfloat16 autocast, at most *part* of them in this call.

    Weights, losses and the optimiser's state are saved as it goes; a further call goes on from there.
    """
    saved = torch.load(file, weights_only=True) if file.exists() else None
    model = GENERator(config(unit)).train()
    file.parent.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    before, losses = 0.0, []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        before, losses = saved["seconds"], saved["losses"]
    torch.manual_seed(len(losses))
    start, last = time.process_time() - before, before

    def save() -> None:
        done = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses, "seconds": spent}
        torch.save(done, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)

    stop = min(seconds, before + part)
    while (spent := time.process_time() - start) < stop:
        for batch in windows(unit, "train", BATCH, seed=len(losses)):
            spent = time.process_time() - start
            if spent >= stop:
                break
            rate = min(1.0, (len(losses) + 1) / 40) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * spent / seconds))
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * rate
            ids = batch["ids"]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids)[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            if len(losses) % 50 == 0:
                bits = sum(losses[-50:]) / 50 / math.log(2) / BASES[unit]
                print(f"step {len(losses)}  {spent:.0f} s  {bits:.4f} bits a base", flush=True)
            if spent - last > 60:
                save()
                last = spent
    save()


@torch.inference_mode()
def node_costs(model: GENERator, context: int) -> dict[int, float]:
    """Time of a pass with n guesses over that of a single token."""
    target = ModelTarget(model, 1, context + 32, passes=1000)
    target.prefill(torch.full((1, context), 40 if model.config.vocab_size > 40 else 8))
    best: dict[int, float] = {}
    for _ in range(12):
        for n in (0, 1, 2, 4, 8, 12, 16):
            tokens = torch.full((1, n + 1), 8)
            start = time.perf_counter()
            if n:
                target.tree(tokens, torch.tensor([[-1, *[0] * n]]))
                target.commit(torch.full((1, 1), -1))
            else:
                target.append(tokens)
            best[n] = min(best.get(n, 1e9), time.perf_counter() - start)
    return {n: round(spent / best[0], 2) for n, spent in best.items()}


def drafts(unit: str, costs: dict[int, float]) -> dict[str, Callable[[], DraftStrategy]]:
    """Token Recycling's fixed trees, and the table by contexts with trees as large as they repay on this machine."""
    slope = (costs[16] - costs[1]) / 15
    entry = max(0.0, costs[1] - 1 - slope)  # what having any guess costs
    orders = (12, 8, 4, 2) if unit == "base" else (2, 1)
    vocab = config(unit).vocab_size
    return {
        "token recycling": lambda: TokenTable(vocab),
        "contexts": lambda: ContextTable(orders, node_cost=slope, entry_cost=entry),
    }


@torch.inference_mode()
def measure(unit: str, file: Path, new: int, prompts: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds a token with and without drafts (the prompt included), alternating, and tokens a forward pass."""
    model = GENERator(config(unit)).eval()
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    ids = next(iter(windows(unit, "test", prompts)))["ids"][:, :128]
    costs = node_costs(model, ids.shape[1])
    specials = tuple(range(32)) if unit == "6-mer" else (*range(7), *range(11, 16))  # and N
    rows = []
    for name, options in {"greedy": {}, "temperature 1": {"temperature": 1.0}}.items():
        for kind, make in drafts(unit, costs).items():
            cfg = GenerateConfig(max_new_tokens=new, ban=specials, draft_budget=16, **options)
            plain, fast, equal, accepted = [], [], True, []
            for _ in range(repeats):
                table, spent = make(), [0.0, 0.0]
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
            row = {"mode": name, "draft": kind, "tokens_per_forward": round(1 + sum(accepted) / len(accepted), 3)}
            row |= {"ms_plain": round(1e3 * min(plain) / (new * len(ids)), 3)}
            row |= {"ms_drafted": round(1e3 * min(fast) / (new * len(ids)), 3)}
            row |= {"gain": round(min(plain) / min(fast), 3)}
            row |= {"different_tokens_out": len(set(without.ids.flatten().tolist()))}
            if name == "greedy":
                row["output_identical"] = bool(equal)
            print(json.dumps(row), flush=True)
            rows.append(row)
    tail = saved["losses"][-20:]
    bits = sum(tail) / len(tail) / math.log(2) / BASES[unit]
    trained = {"steps": len(saved["losses"]), "seconds": round(saved["seconds"]), "train_bits_per_base": round(bits, 4)}
    model_name = f"GENERator 26M over {unit}s, float32"
    return {
        "model": model_name, "training": trained, "pass_with_n_guesses": costs, "new": new, "prompts": prompts,
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unit", choices=tuple(BASES), default="base")
    parser.add_argument("--train", type=float, default=0, help="processor seconds of the whole training")
    parser.add_argument("--part", type=float, default=1e9, help="how many of them in this call")
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
        train(args.unit, args.train, args.part, args.weights)
        return
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": args.clock}
    result |= measure(args.unit, args.weights, args.new, args.prompts, args.repeats, clock)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speculative.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
