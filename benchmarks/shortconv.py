"""The depthwise short convolution, forward and backward, against `nn.Conv1d(groups=C)` on channels-last sequences.

    python benchmarks/shortconv.py [--threads 2 1] [--lengths 1024 ...] [--channels 384] [--taps 3]

One process per length and thread count times both (least of the repeats, two interleaved rounds) and compares results.
Prints a table of ratios and writes results/shortconv.json and .csv.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from _bench import child, interleaved, save, table


def measure(threads: int, length: int, channels: int, taps: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from zoo.nn.shortconv import causal_short_conv

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, g = torch.randn(1, length, channels, requires_grad=True), torch.randn(1, length, channels)
    weight = torch.randn(channels, 1, taps, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)

    def grouped() -> torch.Tensor:
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
        return y[..., :length].transpose(1, 2)

    def step(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), g)

    pairs = zip(step(causal_short_conv(x, weight, bias)), step(grouped()), strict=True)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    forms = {"conv1d": lambda: step(grouped()), "ours": lambda: step(causal_short_conv(x, weight, bias))}
    return {"times": interleaved(forms, budget=1.0), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 10, 1 << 14, 1 << 16, 1 << 18])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--taps", type=int, default=3)
    parser.add_argument("--child", type=int, metavar="LENGTH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.threads[0], args.child, args.channels, args.taps)))
        return
    rows = []
    for threads in args.threads:
        for length in args.lengths:
            load = os.getloadavg()[0]
            sizes = ("--channels", args.channels, "--taps", args.taps)
            answer = child(__file__, "--threads", threads, *sizes, "--child", length, threads=threads)
            (plain, plain_cpu), (ours, ours_cpu) = answer["times"]["conv1d"], answer["times"]["ours"]
            rows.append(
                {
                    "L": length, "threads": threads, "conv1d ms": plain, "ours ms": ours, "ratio": plain / ours,
                    "conv1d cpu ms": plain_cpu, "ours cpu ms": ours_cpu, "cpu ratio": plain_cpu / ours_cpu,
                    "error": answer["error"], "load": load,
                }
            )  # fmt: skip
    print(f"Short convolution of {args.taps} taps on {args.channels} channels, forward and backward:\n{table(rows)}")
    print(f"written to {save('shortconv', rows, channels=args.channels, taps=args.taps)}")


if __name__ == "__main__":
    main()
