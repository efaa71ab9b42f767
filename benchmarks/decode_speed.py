"""Greedy decoding of GENERator-shaped models against `transformers.generate` with its caches, both in one run.

    python benchmarks/decode_speed.py [--sizes 26M 120M] [--batches 1 8] [--prompt 1024] [--new 64] [--clock cpu]

Both sides hold the same weights (converted), get the same prompts and must put out the same tokens (the fraction that
agrees is reported: random weights have near ties). Time is that of decoding alone, from the first new token to the last
(the copy of the weights that the zoo makes for a call falls into it), the best of alternating repeats. Writes
results/decode_speed.json; a row there stays until its own size and batch are measured again with the same settings.
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


class Watch:
    """Notes when tokens come: a streamer of transformers, and `on_tokens` of the zoo."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, value: Tensor) -> None:
        if value.ndim == 1:  # the prompts come first, and are a matrix
            self.times.append(self.clock())

    def end(self) -> None:
        """Nothing is left to put out."""

    def on_tokens(self, sequence: int, tokens: list[int]) -> None:
        if sequence == 0:
            self.times.append(self.clock())


def timed(call: Callable[[Watch], Tensor], new: int, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """(new tokens [B, new], seconds a token after the first)"""
    watch = Watch(clock)
    ids = call(watch)
    assert len(watch.times) == new, f"{len(watch.times)} times for {new} tokens"
    return ids, (watch.times[-1] - watch.times[0]) / (new - 1)


@torch.inference_mode()
def measure(size: str, batch: int, prompt: int, new: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    ours, theirs = pair(size)
    ids = torch.randint(32, 4128, (batch, prompt), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)

    def zoo(watch: Watch) -> Tensor:
        return generate(ours, ids, config=GenerateConfig(max_new_tokens=new), on_tokens=watch.on_tokens).ids

    def peer(cache: str) -> Callable[[Watch], Tensor]:
        def call(watch: Watch) -> Tensor:
            out = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation=cache, pad_token_id=3, streamer=watch,
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
        "size": size, "batch": batch, "prompt": prompt, "new": new, "repeats": repeats,
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
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}
    result |= {"threads": torch.get_num_threads(), "clock": args.clock, "rows": []}
    target = RESULTS / f"{args.name}.json"
    before = json.loads(target.read_text()) if target.is_file() else {}
    same = {**before, "rows": []} == result  # measured with the same versions and settings
    rows = [r for r in before["rows"] if (r["prompt"], r["new"]) == (args.prompt, args.new)] if same else []
    order = [(size, batch) for size in SIZES for batch in (1, 8)]
    for size in args.sizes:
        for batch in args.batches:
            rows = [row for row in rows if (row["size"], row["batch"]) != (size, batch)]
            rows.append(measure(size, batch, args.prompt, args.new, args.repeats, clock))
            print(json.dumps(rows[-1]), flush=True)
            places = {key: i for i, key in enumerate(order)}
            rows.sort(key=lambda row: places.get((row["size"], row["batch"]), len(order)))
            RESULTS.mkdir(exist_ok=True)
            target.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
