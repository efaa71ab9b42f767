"""Every mixer's forward and backward pass beside causal attention, over lengths: one table, one plot.

    python benchmarks/mixers.py [--lengths 1024,4096,16384,65536] [--threads 2] [--clock wall] [--mixers hyena,s4d]

Batch 1, float32. "attention" is our mixer of two heads of 64 (projections and PyTorch's fused causal kernel); peers run
where they are installed: x-transformers' attention and the Mamba-2 layer of transformers. The ratio is attention's time
over the mixer's: up to 4096 tokens both take turns in one process, beyond it is of the same run. Attention's time
beyond --attention-limit tokens is extrapolated by its square and marked. `--clock cpu` counts the process's CPU seconds
instead, which other jobs on the machine change less (take one thread with it). Memory is the peak resident set above
the start of the pass, each measured in a process of its own.

Writes results/mixers.json and results/mixers.png (time and memory against length, both axes logarithmic).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# options of a size that matches: about 4-8 d² weights, heads of 64, states of 16-128 numbers a channel
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 2},
    "window": {"heads": 2, "window": 256},
    "hyena": {},
    "orchid": {},
    "s4d": {},
    "s4": {},
    "lssl": {"d_state": 32},
    "h3": {},
    "mamba2": {},
    "based": {"num_heads": 2},
    "baseconv": {},
    "jrt": {"num_heads": 2, "enc_length": 512},
    "ponet": {"num_heads": 2},
    "longvq": {"num_heads": 2, "block": 128},
    "memory": {"heads": 2, "chunk": 256, "expansion": 2.0},
    "titans": {"variant": "mag", "heads": 2, "window": 256, "memory": {"heads": 2, "chunk": 256, "expansion": 2.0}},
}
TURNS = 4096  # up to this length mixer and attention are timed in turns, in one process
PEERS = ("x-transformers attention", "transformers mamba2")


def build(name: str, d_model: int, length: int) -> Any:
    """A layer for up to *length* tokens, and a function of x [1, L, D] that mixes it."""
    if name == "x-transformers attention":
        from x_transformers.x_transformers import Attention

        peer = Attention(dim=d_model, heads=2, dim_head=64, causal=True, flash=True)
        return peer, lambda x: peer(x)[0] if isinstance(peer(x), tuple) else peer(x)
    if name == "transformers mamba2":
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=d_model,
            num_heads=2 * d_model // 64,
            head_dim=64,
            n_groups=1,
            state_size=128,
            num_hidden_layers=1,
        )
        layer = Mamba2Mixer(config, layer_idx=0)
        return layer, lambda x: layer(x)
    from zoo.nn.backbone import make_mixer
    from zoo.nn.layout import Layout

    options = {**OPTIONS[name], **({"max_len": length} if name in ("hyena", "orchid") else {})}
    mixer = make_mixer("attention" if name == "window" else name, d_model, options)
    kind = "full" if "full" in mixer.info.layouts and "causal" not in mixer.info.layouts else "causal"
    layout = Layout("prefix", prefix=512) if name == "jrt" else Layout(kind)  # type: ignore[arg-type]
    return mixer, lambda x: mixer(x, layout)[0]


def measure(name: str, length: int, d_model: int, threads: int, budget: float, clock: str) -> dict[str, float]:
    """Seconds (best of several) and peak memory of one forward and backward pass, in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module, run = build(name, d_model, length)
    x = torch.randn(1, length, d_model, requires_grad=True)
    weight = torch.randn(1, length, d_model)

    now = time.process_time if clock == "cpu" else time.perf_counter

    def once() -> float:
        start = now()
        (run(x) * weight).sum().backward()
        return now() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = once()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rival: dict[str, float] = {}
    if length <= TURNS and name != "attention":  # takes turns with attention, so that a passing load hits both
        own = run
        _, other = build("attention", d_model, length)
        run = other
        rival["attention"] = once()
    spent, runs = best, 1
    while (spent < budget or (runs < 3 and best < 5)) and runs < 100:  # the first run also warms up
        if rival:
            run = other
            rival["attention"] = min(rival["attention"], once())
            run = own
        best, runs = min(best, took := once()), runs + 1
        spent += took
    parameters = sum(p.numel() for p in module.parameters())
    return {"seconds": best, "peak_mb": peak, "runs": runs, "parameters": parameters, **rival}


def isolated(name: str, length: int, args: argparse.Namespace) -> dict[str, float] | None:
    """`measure` in a process of its own; None where a peer is not installed or fails."""
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        str(length),
        str(args.d_model),
        str(args.threads),
        str(args.budget),
        args.clock,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{name} at {length}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def plot(table: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Time and memory against length, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    styles = ["-", "--", "-."]
    for i, (name, rows) in enumerate(table.items()):
        lengths = sorted(int(n) for n in rows)
        for axis, key, factor in ((axes[0], "seconds", 1000.0), (axes[1], "peak_mb", 1.0)):
            points = [(n, rows[str(n)][key] * factor) for n in lengths if rows[str(n)].get(key, 0) > 0]
            if points:
                color = f"C{i % 10}"
                axis.loglog(*zip(*points, strict=True), styles[i // 10 % 3], marker="o", ms=3, color=color, label=name)
    for axis, label in ((axes[0], "forward + backward, ms"), (axes[1], "peak memory of the pass, MB")):
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if "--one" in sys.argv:
        name, length, width, threads, budget, clock = sys.argv[sys.argv.index("--one") + 1 :]
        print(json.dumps(measure(name, int(length), int(width), int(threads), float(budget), clock)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,4096,16384,65536")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixers", default=",".join([*OPTIONS, *PEERS]))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--update", action="store_true", help="replace only the named mixers in results/mixers.json")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds spent on repeats of one measurement")
    parser.add_argument("--attention-limit", type=int, default=16384, help="longest run of attention and of the peers")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    names = args.mixers.split(",")
    table: dict[str, dict[str, dict[str, float]]] = {}
    if args.update:
        table = json.loads((RESULTS / "mixers.json").read_text())["mixers"]
    if not args.update and "attention" not in names:
        names.append("attention")
    for name in sorted(names, key=lambda n: n != "attention"):  # first: the others are compared with it
        rows: dict[str, dict[str, float]] = dict(table.get(name, {})) if args.update else {}
        for length in lengths:
            if name in ("attention", *PEERS) and length > args.attention_limit:
                last = rows.get(str(args.attention_limit))
                if last and name != PEERS[1]:  # whose memory would not do
                    factor = (length / args.attention_limit) ** 2
                    rows[str(length)] = {"seconds": last["seconds"] * factor, "peak_mb": 0.0, "extrapolated": 1.0}
                continue
            result = isolated(name, length, args)
            if result is None:
                break
            rows[str(length)] = result
            base = (rows if name == "attention" else table["attention"])[str(length)]["seconds"]
            ratio = result.get("attention", base) / result["seconds"]
            print(
                f"{name:26} {length:7} {result['seconds'] * 1e3:10.1f} ms {result['peak_mb']:8.0f} MB  x{ratio:.2f}",
                flush=True,
            )
        table[name] = rows
    lengths = sorted({int(n) for rows in table.values() for n in rows})
    print_table(table, lengths)
    RESULTS.mkdir(exist_ok=True)
    data = {"d_model": args.d_model, "threads": args.threads, "clock": args.clock, "lengths": lengths, "mixers": table}
    (RESULTS / "mixers.json").write_text(json.dumps(data, indent=1) + "\n")
    plot(table, RESULTS / "mixers.png")


def print_table(table: dict[str, dict[str, dict[str, float]]], lengths: list[int]) -> None:
    """Milliseconds and, in brackets, attention's time over the mixer's; ~ marks what is extrapolated."""
    print("\n| mixer | " + " | ".join(f"{n}" for n in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for name, rows in table.items():
        cells = []
        for n in lengths:
            row, base = rows.get(str(n)), table["attention"].get(str(n))
            mark = "~" if row and row.get("extrapolated") else ""
            cells.append(
                f"{mark}{row['seconds'] * 1e3:.1f} ({row.get('attention', base['seconds']) / row['seconds']:.2f}x)"
                if row and base
                else "-"
            )
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
