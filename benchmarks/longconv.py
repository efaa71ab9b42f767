"""The long convolution, forward and backward (du and dk), against the plain padded rfft through autograd.

    python benchmarks/longconv.py [--threads 2 1] [--lengths 1024 ...] [--width 128] [--batch 1]

For each length and thread count one process times both (least of the repeats, in interleaved rounds) and compares
y, du and dk; two more processes measure the peak of resident memory over the inputs. Prints a table of ratios and
writes results/longconv.json and .csv.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from _bench import Peak, child, interleaved, save, table

LENGTHS = [1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20]


def forms() -> dict[str, Callable[..., Any]]:
    import torch

    from zoo.nn.longconv import long_conv

    def plain(u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        n = 2 * u.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]

    return {"plain": plain, "ours": long_conv}


def measure(task: str, threads: int, length: int, width: int, batch: int) -> dict[str, Any]:
    """One process's work: `time` both forms, or the memory of one of them."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    u = torch.randn(batch, width, length, requires_grad=True)
    k, g = torch.randn(width, length, requires_grad=True), torch.randn(batch, width, length)

    def step(fn: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        y = fn(u, k)
        return y.detach(), *torch.autograd.grad(y, (u, k), g)

    if task != "time":
        small = torch.ones(1, 1, length, requires_grad=True)
        forms()[task](small, torch.ones(1, length)).sum().backward()  # threads, libraries and tables
        with Peak() as peak:
            step(forms()[task])
        return {"mb": peak.extra / 2**20}
    found, right = step(forms()["ours"]), step(forms()["plain"])
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, right, strict=True)]
    del found, right
    work = {name: lambda fn=fn: step(fn) for name, fn in forms().items()}
    # twice at least: the first call after the rival finds the memory that the rival has just given back to the system
    # Below 128k in more and shorter rounds: what else the machine does passes over a whole second of short calls.
    long = length > 1 << 17
    rounds = [interleaved(work, least=2, budget=1.0 if long else 0.2, warm=True) for _ in range(1 if long else 6)]
    times = {name: [min(r[name][i] for r in rounds) for i in range(2)] for name in work}
    return {"times": times, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--name", default="longconv", help="of the result files")
    parser.add_argument("--child", nargs=2, metavar=("TASK", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task, length = args.child
        print(json.dumps(measure(task, args.threads[0], int(length), args.width, args.batch)))
        return
    rows = []
    for threads in args.threads:
        for length in args.lengths:
            run = lambda task, length=length, threads=threads: child(
                __file__, "--threads", threads, "--width", args.width, "--batch", args.batch,
                "--child", task, length, threads=threads,
            )  # fmt: skip
            load, answer = os.getloadavg()[0], run("time")
            memory = {name: run(name)["mb"] for name in ("plain", "ours")}
            (plain, plain_cpu), (ours, ours_cpu) = answer["times"]["plain"], answer["times"]["ours"]
            row = {
                "L": length, "threads": threads, "plain ms": plain, "ours ms": ours, "ratio": plain / ours,
                "plain cpu ms": plain_cpu, "ours cpu ms": ours_cpu, "cpu ratio": plain_cpu / ours_cpu,
                "plain MB": memory["plain"], "ours MB": memory["ours"], "MB ratio": memory["plain"] / memory["ours"],
                **dict(zip(("y err", "du err", "dk err"), answer["errors"], strict=True)), "load": load,
            }  # fmt: skip
            rows.append(row)
            print(table(rows).splitlines()[0] if len(rows) == 1 else "", table([row]).splitlines()[1], flush=True)
    print(f"\nLong convolution, batch {args.batch}, width {args.width}, forward and backward:\n{table(rows)}")
    print(f"written to {save(args.name, rows, batch=args.batch, width=args.width)}")


if __name__ == "__main__":
    main()
