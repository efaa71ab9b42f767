"""A HyenaDNA training step (2 blocks of width 128, batch 1) by length, against two others of the same width.

    python benchmarks/hyenadna_step.py [--threads 2 1] [--long]

`plain` is the same function written straightforwardly: padded rfft through autograd, nn.Conv1d, everything over the
whole length at once; it is checked to give the same loss. `attention` has causal SDPA (2 heads) in Hyena's place. Each
measurement is a process of its own (peak memory), the three of one length one after the other. A step is forward,
cross-entropy, backward, AdamW; the least of its repeats counts. `--long` adds 256k and 1M for ours (and plain at
256k). Prints the table, the ratios and the fitted exponent of time in length; writes results/hyenadna_step.json.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDTH, LAYERS, VOCAB = 128, 2, 16
LENGTHS = [1024, 4096, 16384, 65536]
LONG = [262144, 1048576]
RESULTS = Path(__file__).parent / "results"


def plain_model(max_len: int) -> Any:
    """The straightforward implementation, with the official names of its weights."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Sin(nn.Module):
        def __init__(self, freq: nn.Parameter) -> None:
            super().__init__()
            self.freq = freq

        def forward(self, x: Any) -> Any:
            return torch.sin(self.freq * x)

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(WIDTH))
            t = torch.linspace(0, 1, max_len)[None, :, None]
            w = 2 * math.pi * torch.linspace(0, max_len - 1, max_len)[None, :, None] / max_len
            wave = torch.exp(-1j * torch.linspace(1e-4, 1, 2) * w)
            self.pos_emb = nn.Module()
            self.pos_emb.register_buffer("z", torch.cat([t, wave.real, wave.imag], -1))
            self.pos_emb.register_buffer("t", t)
            sin = Sin(nn.Parameter(10 * torch.ones(1, 64)))
            self.implicit_filter = nn.Sequential(
                nn.Linear(5, 64), sin, nn.Linear(64, 64), sin, nn.Linear(64, 64), sin, nn.Linear(64, WIDTH, bias=False)
            )
            self.modulation = nn.Module()
            rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, WIDTH)
            self.modulation.register_buffer("deltas", rates[None, None])

        def forward(self, length: int) -> Any:
            window = torch.exp(-self.pos_emb.t[:, :length] * self.modulation.deltas.abs()) + 0.05
            return (self.implicit_filter(self.pos_emb.z[:, :length]) * window)[0].T

    class Operator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.short_filter = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)
            self.filter_fn = Filter()

        def forward(self, x: Any) -> Any:
            length = x.shape[1]
            u = self.short_filter(self.in_proj(x).transpose(1, 2))[..., :length]
            gate, x1, v = u.split(WIDTH, 1)
            v = v * x1
            spectrum = torch.fft.rfft(self.filter_fn(length), n=2 * length) * torch.fft.rfft(v, n=2 * length)
            v = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + v * self.filter_fn.bias[:, None]
            return self.out_proj((v * gate).transpose(1, 2))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.mixer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Operator()
            self.mlp = nn.Module()
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            x = x + self.mixer(self.norm1(x))
            return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)), approximate="tanh"))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.embeddings = nn.Module()
            self.backbone.embeddings.word_embeddings = nn.Embedding(VOCAB, WIDTH)
            self.backbone.layers = nn.ModuleList(Block() for _ in range(LAYERS))
            self.backbone.ln_f = nn.LayerNorm(WIDTH)
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
            self.lm_head.weight = self.backbone.embeddings.word_embeddings.weight

        def forward(self, ids: Any) -> Any:
            x = self.backbone.embeddings.word_embeddings(ids)
            for layer in self.backbone.layers:
                x = layer(x)
            return self.lm_head(self.backbone.ln_f(x))

    return Plain()


def build(kind: str, max_len: int) -> Any:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from zoo.convert import hyenadna as convert
    from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

    torch.manual_seed(0)
    config = HyenaDNAConfig(d_model=WIDTH, n_layer=LAYERS, max_len=max_len, embed_dropout=0.0)
    model = HyenaDNA(config)
    if kind == "ours":
        return model
    if kind == "plain":
        plain = plain_model(max_len)
        plain.load_state_dict(convert.to_official(model.state_dict(), config))
        return plain

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Any, layout: Any, state: Any = None) -> tuple[Any, None]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2)), None

    for layer in model.backbone.layers:
        info = layer.mixer.info
        layer.mixer = Attention()
        layer.mixer.info = info
    return model


def child(kind: str, length: int, threads: int) -> None:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    model = build(kind, length)
    groups = model.param_groups() if hasattr(model, "param_groups") else model.parameters()
    optimiser = torch.optim.AdamW(groups, lr=1e-4)
    ids = torch.randint(7, 11, (1, length), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(ids[:, :64]).flatten(0, 1)[:-1], ids[0, 1:64]).backward()  # allocator, FFT plans
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, losses, begun = [], [], time.perf_counter()
    while len(times) < 5 and (not times or time.perf_counter() - begun < 20):
        optimiser.zero_grad()
        start = time.perf_counter()
        loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        loss.backward()
        optimiser.step()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {"seconds": min(times), "loss": losses[0], "peak_mb": peak / 1024, "extra_mb": (peak - before) / 1024}
        )
    )


def measure(kind: str, length: int, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, str(length), str(threads)],
        capture_output=True, text=True, check=True, env={**__import__("os").environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    row = {"kind": kind, "length": length, "threads": threads, **json.loads(done.stdout.splitlines()[-1])}
    print(f"  {kind:<10}{length:>9}  {threads} threads  {row['seconds']:9.3f} s  {row['extra_mb']:8.0f} MB", flush=True)
    return row


def exponent(rows: list[dict[str, Any]]) -> float:
    """Least-squares slope of log time over log length."""
    xs, ys = [math.log(r["length"]) for r in rows], [math.log(r["seconds"]) for r in rows]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), int(args.child[2]))
        return
    rows, lines = [], []
    for threads in args.threads:
        for length in [*args.lengths, *(LONG if args.long and threads == max(args.threads) else [])]:
            kinds = ["ours", "plain", "attention"] if length <= 65536 else ["ours", "plain"][: 1 + (length < 2**20)]
            rows += (mine := [measure(kind, length, threads) for kind in kinds])
            by = {row["kind"]: row for row in mine}
            line = f"{length:>9}  {threads} thr  ours {by['ours']['seconds']:8.3f} s {by['ours']['extra_mb']:7.0f} MB"
            for kind in kinds[1:]:
                line += f" | {kind} {by[kind]['seconds']:8.3f} s {by[kind]['extra_mb']:7.0f} MB"
                line += f" = {by[kind]['seconds'] / by['ours']['seconds']:.2f}x"
            if "plain" in by:
                assert abs(by["plain"]["loss"] - by["ours"]["loss"]) < 1e-4, "plain computes something else"
            lines.append(line)
        ours = [r for r in rows if r["kind"] == "ours" and r["threads"] == threads and r["length"] >= 16384]
        if len(ours) > 1:
            lines.append(f"exponent of ours from 16k to {ours[-1]['length']}: {exponent(ours):.3f} ({threads} threads)")
        other = [r for r in rows if r["kind"] == "attention" and r["threads"] == threads and r["length"] >= 4096]
        if len(other) > 1:
            lines.append(f"exponent of attention from 4k: {exponent(other):.3f} ({threads} threads)")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hyenadna_step.json").write_text(json.dumps({"rows": rows, "table": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
