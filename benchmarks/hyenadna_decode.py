"""Generating with HyenaDNA: milliseconds a base with the carried state, against recomputing the sequence for each base.

    python benchmarks/hyenadna_decode.py [--threads 2 1] [--lengths 1024 4096 16384 32768]

Model: 4 blocks of width 256 (hyenadna-small-32k). For each context the state is filled by one pass over the prompt
(its time is given), then 32 bases are generated greedily; recomputing runs the whole sequence for each of up to 8.
Both must choose the same bases. Writes results/hyenadna_decode.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

RESULTS = Path(__file__).parent / "results"


@torch.inference_mode()
def by_state(model: HyenaDNA, prompt: Tensor, count: int) -> tuple[list[int], float, float, float]:
    """Bases, seconds of the prompt, seconds a base, bytes of state a context token."""
    start = time.perf_counter()
    length = prompt.shape[1]
    hidden, state = model.forward_features(prompt, state=model.init_state(1, length + count))
    logits = model.forward_head(hidden[:, -1:])
    filled = time.perf_counter() - start
    bases, start = [], time.perf_counter()
    for _ in range(count):
        token = logits[:, -1, 7:11].argmax(-1, keepdim=True) + 7
        bases.append(int(token))
        hidden, state = model.forward_features(token, state=state)
        logits = model.forward_head(hidden)
    assert state is not None
    return bases, filled, (time.perf_counter() - start) / count, state.nbytes() / (length + count)


@torch.inference_mode()
def by_recomputing(model: HyenaDNA, prompt: Tensor, count: int) -> tuple[list[int], float]:
    bases, ids = [], prompt
    start = time.perf_counter()
    for _ in range(count):
        hidden, _ = model.forward_features(ids)
        token = model.forward_head(hidden[:, -1:])[:, -1, 7:11].argmax(-1, keepdim=True) + 7
        bases.append(int(token))
        ids = torch.cat([ids, token], 1)
    return bases, (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HyenaDNA(HyenaDNAConfig(d_model=256, n_layer=4, max_len=max(args.lengths) + 64)).eval()
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for length in args.lengths:
            prompt = torch.randint(7, 11, (1, length))
            by_state(model, prompt, 2)  # filters and FFT plans
            bases, filled, step, memory = by_state(model, prompt, 32)
            count = 8 if length <= 16384 else 3
            again, whole = by_recomputing(model, prompt, count)
            assert bases[:count] == again, "the two ways generate different bases"
            rows.append(
                {"length": length, "threads": threads, "prompt_s": filled, "state_ms": 1e3 * step,
                 "recompute_ms": 1e3 * whole, "ratio": whole / step, "state_bytes_a_token": memory}
            )  # fmt: skip
            print(
                f"{length:>7}  {threads} threads  prompt {filled:7.3f} s  by state {1e3 * step:8.2f} ms a base  "
                f"recomputing {1e3 * whole:9.1f} ms  = {whole / step:7.1f}x",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hyenadna_decode.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
