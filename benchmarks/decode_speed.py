"""Greedy decoding of GENERator-shaped models against `transformers.generate` with its caches, both in one run.

    python benchmarks/decode_speed.py [--sizes 26M 120M] [--batches 1 8] [--prompt 1024] [--new 64] [--clock cpu]

Both sides hold the same weights (converted), get the same prompts and must put out the same tokens (the fraction that
agrees is reported: random weights have near ties). Time is that of decoding alone: a call for --new tokens less one for
a single token, the best of alternating repeats. Writes results/decode_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.llama import config_to_official, to_official
from zoo.generate.engine import GenerateConfig, generate
from zoo.models.generator import GENERator, GENERatorConfig

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "26M": {"d_model": 512, "n_layer": 12, "n_head": 8, "n_kv_head": 2, "d_inner": 768},
    "120M": {"d_model": 768, "n_layer": 12, "n_head": 12, "n_kv_head": 3, "d_inner": 3456},
}


def pair(size: str) -> tuple[GENERator, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = GENERatorConfig(**SIZES[size], max_len=4096)
    ours = GENERator(config).eval()
    fields = {key: value for key, value in config_to_official(config).items() if key not in ("architectures",)}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    theirs.load_state_dict(to_official(ours.state_dict(), config), strict=True)
    theirs.generation_config.eos_token_id = None
    return ours, theirs


def timed(call: Callable[[int], Tensor], new: int, clock: Callable[[], float]) -> tuple[Tensor, float]:
    start = clock()
    call(1)
    prefill = clock() - start
    start = clock()
    ids = call(new)
    return ids, (clock() - start - prefill) / (new - 1)


@torch.inference_mode()
def measure(size: str, batch: int, prompt: int, new: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    ours, theirs = pair(size)
    ids = torch.randint(32, 4128, (batch, prompt), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)

    def zoo(count: int) -> Tensor:
        return generate(ours, ids, config=GenerateConfig(max_new_tokens=count)).ids

    def peer(cache: str) -> Callable[[int], Tensor]:
        def call(count: int) -> Tensor:
            out = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                cache_implementation=cache, pad_token_id=3,
            )  # fmt: skip
            return out[:, prompt:]

        return call

    calls = {"zoo": zoo, "dynamic": peer("dynamic"), "static": peer("static")}
    best: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            outputs[name], seconds = timed(call, new, clock)
            best[name] = min(best.get(name, 1e9), seconds)
    rival = min(best["dynamic"], best["static"])
    return {
        "size": size, "batch": batch, "prompt": prompt, "new": new,
        "ms_per_step": {name: round(1e3 * seconds, 2) for name, seconds in best.items()},
        "tokens_per_second": {name: round(batch / seconds, 1) for name, seconds in best.items()},
        "ratio_to_best_peer": round(rival / best["zoo"], 3),
        "tokens_agree": float((outputs["zoo"] == outputs["dynamic"]).float().mean()),
    }  # fmt: skip


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread, on a busy machine"
    )
    parser.add_argument("--name", default="decode_speed")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            rows.append(measure(size, batch, args.prompt, args.new, args.repeats, clock))
            print(json.dumps(rows[-1]), flush=True)
            result = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}
            result |= {"threads": torch.get_num_threads(), "clock": args.clock, "rows": rows}
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
