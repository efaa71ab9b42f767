"""Training with a sliding window: blocked SDPA against SDPA with a dense mask, and against full causal attention.

    python benchmarks/windowed_attention.py [--threads 2] [--window 256] [--lengths 4096 16384] [--repeats 5]

Forward and backward of batch 1 with heads of width 64 in float32. Each time is the least of the repeats, the forms
taking turns. Outputs and gradients of the two windowed forms are compared. Writes results/windowed_attention.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.layout import Layout
from zoo.nn.masks import attend

RESULTS = Path(__file__).parent / "results"


def run(form: str, q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor) -> Tensor:
    """Attention over q, k, v [B, L, H, d] in one of the three forms."""
    if form == "blocked":
        return attend(q, k, v, Layout("window", window=(window - 1, 0)), q.shape[-1] ** -0.5)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if form == "dense":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for length in args.lengths:
        q, k, v, weight = (torch.randn(1, length, args.heads, 64) for _ in range(4))
        place = torch.arange(length)
        mask = (place <= place[:, None]) & (place > place[:, None] - args.window)
        best = dict.fromkeys(("blocked", "dense", "causal"), float("inf"))
        kept: dict[str, list[Tensor]] = {}
        for turn in range(args.repeats + 1):  # the first warms up
            for form in best:
                leaves = [t.clone().requires_grad_() for t in (q, k, v)]
                start = time.perf_counter()
                y = run(form, *leaves, args.window, mask)
                (y * weight).sum().backward()
                seconds = time.perf_counter() - start
                if turn:
                    best[form] = min(best[form], seconds)
                else:
                    kept[form] = [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]
        error = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(kept["blocked"], kept["dense"], strict=True)
        )
        assert error < 1e-4, error
        row = {"length": length, "window": args.window, "seconds": best, "relative_error": error}
        row |= {"over_dense": best["dense"] / best["blocked"], "over_causal": best["causal"] / best["blocked"]}
        rows.append(row)
        print(
            f"L {length}, window {args.window}, {args.threads} threads: blocked {1000 * best['blocked']:.0f} ms, "
            f"dense mask {1000 * best['dense']:.0f} ms ({row['over_dense']:.1f} x), "
            f"full causal {1000 * best['causal']:.0f} ms ({row['over_causal']:.1f} x), error {error:.1e}"
        )
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"threads": args.threads, "heads": args.heads, "rows": rows}, indent=1)
    (RESULTS / "windowed_attention.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
