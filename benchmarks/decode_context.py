"""Milliseconds a token against the length of the context: attention, window attention, Mamba-2, BASED and Hyena.

    python benchmarks/decode_context.py [--contexts 1024 8192 65536] [--threads 2]

Models of two layers of width 256 over a vocabulary of 16. Caches are filled with random numbers up to the context
(Hyena reads a random prompt), so that the step is measured and not the prompt. Writes results/decode_context.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.generate.target import ModelTarget
from zoo.models.lm import LM, LMConfig
from zoo.nn.kv import KVState, RingState
from zoo.nn.mlp import MLPConfig

RESULTS = Path(__file__).parent / "results"
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"heads": 4}),
    "window 512": ("attention", {"heads": 4, "window": 512}),
    "mamba2": ("mamba2", {}),
    "based": ("based", {"num_heads": 4, "feature_dim": 16}),
    "hyena": ("hyena", {}),
}


@torch.inference_mode()
def filled(name: str, context: int, steps: int) -> ModelTarget:
    mixer, options = MIXERS[name]
    room = context + steps
    options = {**options, "max_len": room} if mixer == "hyena" else options
    torch.manual_seed(0)
    mlp = MLPConfig(kind="gelu", width=1024)
    model = LM(LMConfig(d_model=256, n_layer=2, mixer=mixer, options=options, mlp=mlp, max_len=room)).eval()
    target = ModelTarget(model, 1, room)
    for state in target.state.layers:
        if isinstance(state, KVState):
            state.k.normal_()
            state.v.normal_()
            state.length = state.base = state.longest = context
        elif isinstance(state, RingState):
            state.k.normal_()
            state.v.normal_()
            state.length = context
    if mixer == "hyena":
        target.prefill(torch.randint(16, (1, context)))
    return target


@torch.inference_mode()
def measure(name: str, context: int, steps: int, clock: Callable[[], float]) -> dict[str, Any]:
    target = filled(name, context, steps + 4)
    token = torch.ones(1, 1, dtype=torch.long)
    for _ in range(4):  # Hyena's filters are made by the first step
        target.step(token)
    times = []
    for _ in range(steps):
        start = clock()
        token = target.step(token).argmax(-1, keepdim=True)
        times.append(clock() - start)
    times.sort()
    row = {"mixer": name, "context": context, "ms_median": round(1e3 * times[steps // 2], 3)}
    return row | {"ms_best": round(1e3 * times[0], 3), "state_mb": round(target.state.nbytes() / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread, on a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = []
    for name in MIXERS:
        for context in args.contexts:
            rows.append(measure(name, context, args.steps, clock))
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": args.clock, "rows": rows}
    (RESULTS / "decode_context.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
