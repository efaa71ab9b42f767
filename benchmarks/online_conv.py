"""Decoding a long convolution: the online schedule against the O(t) dot product, per token and in all.

    python benchmarks/online_conv.py [--threads 1] [--width 128] [--batch 1] [--lengths 1024 ...]

The schedule decodes all L tokens; the direct form is timed at positions 128, 256, ... and its total is the area under
the straight lines between them. The crossover is the first of those positions where one token of the direct form costs
more than the schedule's mean.
Prints the table and writes results/online_conv.json and .csv.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from typing import Any

from _bench import save, table

LENGTHS = [1 << 10, 1 << 12, 1 << 14, 1 << 16]


def schedule(length: int, width: int, batch: int, base: int) -> tuple[float, float]:
    """Processor microseconds a token over *length* tokens, and its relative error against the parallel form."""
    import torch

    from zoo.nn.longconv import long_conv
    from zoo.nn.online_conv import OnlineConv

    torch.manual_seed(0)
    u, k = torch.randn(batch, width, length), torch.randn(width, length) / length**0.5
    tokens = u.movedim(2, 0).contiguous()  # [L, B, D]
    conv, best = OnlineConv(k, base=base), float("inf")
    for _ in range(3 if length <= 1 << 14 else 2):
        state, outputs, began = conv.init_state(batch), torch.empty_like(tokens), time.process_time()
        for t in range(length):
            outputs[t], state = conv.push(tokens[t], state)
        best = min(best, time.process_time() - began)
    right = long_conv(u, k)
    return best / length * 1e6, ((outputs.movedim(0, 2) - right).abs().max() / right.abs().max()).item()


def direct(length: int, width: int, batch: int) -> dict[int, float]:
    """Processor microseconds of one token of the direct form at positions up to *length*."""
    import torch

    from zoo.nn.online_conv import OnlineConv

    conv, costs, position = OnlineConv(torch.randn(width, length)), {}, 128
    state, token = conv.init_state(batch), torch.randn(batch, width)
    state.history.normal_()
    while position <= length:
        repeats, best = max(3, min(200, (1 << 22) // position)), float("inf")
        for _ in range(repeats):
            state.position, began = position - 1, time.process_time()
            conv.push_direct(token, state)
            best = min(best, time.process_time() - began)
        costs[position] = best * 1e6
        position *= 2
    return costs


def total(costs: dict[int, float], length: int) -> float:
    """Mean microseconds a token over *length* tokens: the measured curve, straight between its points."""
    points = sorted(costs.items())
    area = points[0][0] * points[0][1]
    for (a, x), (b, y) in itertools.pairwise(points):
        if b <= length:
            area += (b - a) * (x + y) / 2
    return area / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--base", type=int, default=64)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    costs = direct(max(args.lengths), args.width, args.batch)
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        load = os.getloadavg()[0]
        online, error = schedule(length, args.width, args.batch, args.base)
        mean = total(costs, length)
        rows.append(
            {
                "L": length, "online us/token": online, "direct us/token": mean, "ratio": mean / online,
                "direct us, last token": costs[length], "last token ratio": costs[length] / online, "error": error,
                "load": load,
            }
        )  # fmt: skip
    crossover = next((position for position, cost in sorted(costs.items()) if cost > rows[0]["online us/token"]), None)
    print(f"Decoding by a long convolution, batch {args.batch}, width {args.width}, {args.threads} threads:")
    print(table(rows))
    print(f"one token of the direct form costs more than the schedule's mean from about t = {crossover}")
    about = {"batch": args.batch, "width": args.width, "threads": args.threads, "base": args.base}
    path = save("online_conv", rows, **about, crossover=crossover, direct_us=costs)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
