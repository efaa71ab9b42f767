"""Which mixer trains in which model family: a tiny model of each pair learns repeats, and the table says how well.

    python benchmarks/combinations.py [--steps 150] [--out docs/mixers.md] [--families nbp,mqt]

Sequences of 64 tokens repeat a random motif of 8 (four letters), so that whoever mixes tokens can predict most of
them. Causal families learn the next token, bidirectional ones the masked ones, NBP the next block of 8, MQT's decoder
the next token behind a picture's; a cell shows the loss in nats before and after training (chance is ln 4 = 1.39), or
why the pair is refused when the model is built. With --families only those columns of the file are made again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import catalogue
from zoo.config import from_dict, resolve
from zoo.errors import ConfigError
from zoo.nn.mixer import split_param_groups

LENGTH, MOTIF, WIDTH, MASK = 64, 8, 32, 4
TIMES = Path(__file__).parent / "results" / "mixers.json"
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "rope": {}},
    "hyena": {"max_len": LENGTH, "filter_width": 16},
    "s4d": {"d_state": 16, "dt_min": 0.01, "dt_max": 0.5},
    "s4": {"d_state": 16, "dt_min": 0.01, "dt_max": 0.5},
    "lssl": {"d_state": 16, "dt_min": 0.01, "dt_max": 0.5},
    "h3": {"d_state": 16},
    "mamba2": {"d_state": 16, "head_dim": 16},
    "based": {"num_heads": 4, "feature_dim": 8},
    "baseconv": {"kernel": 9},
    "jrt": {"num_heads": 4, "feature_dim": 8, "enc_length": 8},
    "longvq": {"num_heads": 4, "key_dim": 8, "codes": 16, "block": 16, "d_state": 16},
    "memory": {"heads": 2, "chunk": 8},
    "titans": {"heads": 4, "window": 16, "memory": {"heads": 2, "chunk": 16}},
    "ponet": {"num_heads": 4, "segments": 8},
    "orchid": {"max_len": LENGTH, "filter_width": 16, "emb_dim": 9, "sin_freq": 10.0},
    "bidirectional": {"mixer": "mamba2", "options": {"d_state": 16, "head_dim": 16}},
}
common = {"d_model": WIDTH, "n_layer": 2, "vocab_size": 8}
tower = {"vit": {"width": 16, "layers": 1, "heads": 2, "mlp": {"kind": "gelu", "width": 32}}, "size": 28, "patch": 7}
queries = {"grid": 2, "width": 16, "out_width": WIDTH, "heads": 2, "source": [4, 4], "law": "all"}
decoder = {**common, "d_inner": 64, "n_head": 4, "head": {"tied": False}}
blocks = {"d_model": WIDTH, "n_layer": 2, "mlp": {"kind": "gelu", "width": 64}, "video_vocab": 8, "max_len": LENGTH}
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {  # name -> family, config, options field, what it learns
    "lm": ("lm", {**common, "mlp": {"width": 64}, "max_len": LENGTH}, "options", "next"),
    "hyenadna": ("hyenadna", {**common, "max_len": LENGTH, "embed_dropout": 0.0}, "mixer_options", "next"),
    "generator": ("generator", {**common, "d_inner": 64, "n_head": 4}, "mixer_options", "next"),
    "lm, full": ("lm", {**common, "mlp": {"width": 64}, "max_len": LENGTH, "layout": "full"}, "options", "masked"),
    "dnabert2": ("dnabert2", {**common, "d_inner": 64, "n_head": 4, "dropout": 0.0}, "mixer_options", "masked"),
    "nbp": ("nbp", {**blocks, "grid": [8, 2, 4], "block": 8, "init_std": 0.1}, "options", "block"),
    "mqt": ("mqt", {"tower": tower, "queries": queries, "lm": decoder}, "mixer_options", "picture"),
}


def batch(size: int) -> Tensor:
    """[size, LENGTH] ids of repeated motifs."""
    motif = torch.randint(0, 4, (size, MOTIF))
    return motif.repeat(1, LENGTH // MOTIF)


def loss_of(model: Any, kind: str, size: int = 16) -> Tensor:
    """Mean cross-entropy of the tokens after the first motif (next token or block), or of the masked ones."""
    ids = batch(size)
    if kind == "next":
        return F.cross_entropy(model(ids)[:, MOTIF:-1].flatten(0, 1), ids[:, MOTIF + 1 :].flatten())
    if kind == "block":
        sent, wanted = model.arrange(ids.view(size, *model.config.grid))
        return F.cross_entropy(model(sent).flatten(0, 1), wanted.flatten())
    if kind == "picture":
        placed = F.pad(ids, (1, 0), value=model.config.image_token)
        logits = model(placed, torch.rand(size, 3, 28, 28))[:, -LENGTH:]
        return F.cross_entropy(logits[:, MOTIF:-1].flatten(0, 1), ids[:, MOTIF + 1 :].flatten())
    hidden = torch.rand(ids.shape) < 0.15
    hidden[:, 0] = True
    return F.cross_entropy(model(ids.masked_fill(hidden, MASK))[hidden], ids[hidden])


def train(family: str, config: dict[str, Any], options_field: str, kind: str, mixer: str, steps: int) -> str:
    """One cell of the table."""
    torch.manual_seed(0)
    model_class = resolve(catalogue.MODELS[family])
    options = dict(MIXERS[mixer])
    if mixer == "hyena" and kind == "masked":
        options["bidirectional"] = "two_sided"
    if mixer in ("s4d", "s4") and kind == "masked":
        options["bidirectional"] = True
    if kind == "picture" and "max_len" in options:
        options["max_len"] = LENGTH + 4  # visual tokens stand before the text
    own = {"mixer": mixer, options_field: options}
    fields = {**config, "lm": {**config["lm"], **own}} if family == "mqt" else {**config, **own}
    try:
        model = model_class(from_dict(model_class.Config, fields)).train()
    except ConfigError as error:
        served = re.search(r"it serves: (.*)\)", str(error))
        return f"refused (serves: {served[1]})" if served else f"refused: {error}"
    groups = [{"params": g["params"], "weight_decay": g.get("weight_decay", 0.01)} for g in split_param_groups(model)]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    with torch.no_grad():
        before = float(loss_of(model, kind, 64))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, kind).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after = float(loss_of(model.eval(), kind, 64))
    if not math.isfinite(after):
        return f"{before:.2f} → not finite"
    return f"{before:.2f} → {after:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("docs/mixers.md"))
    parser.add_argument("--families", default=",".join(name.replace(", ", "-") for name in FAMILIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in FAMILIES if name.replace(", ", "-") in args.families.split(",")]
    kept = table(args.out) if args.out.exists() and len(chosen) < len(FAMILIES) else {}
    lines = [
        "# Which mixer trains in which family",
        "",
        f"Made by `python benchmarks/combinations.py --steps {args.steps}`. Two layers of width {WIDTH} learn",
        f"to repeat motifs of {MOTIF} letters; loss in nats before → after {args.steps} steps (chance 1.39).",
        "`bidirectional` wraps mamba2; hyena, s4 and s4d use their own two-sided forms in bidirectional families.",
        "One run, one seed, AdamW at 5e-3 for all. A cell near 1.39 has learned the letters, not the repeat, in so few",
        "steps, which says nothing of more steps or another rate; one that ends above 1.39 was unstable at this rate.",
        "",
        "`nbp` predicts the next block of 8, which wants a block-causal mask, hence attention. `mqt` is the decoder of",
        "the vision-language model behind 4 visual tokens (`model.lm.mixer`). MQT's query transformer is one cross-",
        "attention and the image generators RAR and MaskGIT are built of adaLN or BERT blocks of published weights:",
        "these three mix by attention only and have no `mixer` field. An image-token generator of another mixer is an",
        "`lm` over image codes.",
        "",
        "| mixer | " + " | ".join(FAMILIES) + " |",
        "|---" * (len(FAMILIES) + 1) + "|",
    ]
    for mixer in MIXERS:
        cells = []
        for name in FAMILIES:
            old = kept.get(mixer, {}).get(name)
            cells.append(old if old and name not in chosen else train(*FAMILIES[name], mixer, args.steps))
        lines.append(f"| {mixer} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines + times()) + "\n")


def times() -> list[str]:
    """What `mixers.py` measured, where it was run."""
    if not TIMES.exists():
        return []
    data = json.loads(TIMES.read_text())
    lengths = [str(n) for n in data["lengths"]]
    lines = [
        "",
        "## Time",
        "",
        f"Milliseconds of one layer's forward and backward pass (width {data['d_model']}, batch 1, float32,",
        f"{data['threads']} threads of a CPU), and in brackets how many times as fast as causal attention of two heads",
        "of 64. Made by `python benchmarks/mixers.py`, which also draws `benchmarks/results/mixers.png`. Kernels that",
        "are made anew for every pass (Hyena, H3, S4, LSSL, Orchid) weigh most here, where they serve one sequence.",
        "~ is extrapolated by the square of the length; * is of an earlier run of the same program.",
        "",
        "| layer | " + " | ".join(f"{int(n):,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    base = data["mixers"]["attention"]
    for name, rows in data["mixers"].items():
        cells = []
        for n in lengths:
            row = rows.get(n)
            if row is None:
                cells.append("-")
                continue
            ratio = row.get("attention", base[n]["seconds"]) / row["seconds"]
            mark = "~" if row.get("extrapolated") else "*" if row.get("earlier_run") else ""
            digits = 1 if row["seconds"] < 0.1 else 0, 2 if ratio < 10 else 0
            cells.append(f"{mark}{row['seconds'] * 1e3:,.{digits[0]}f} ({ratio:.{digits[1]}f}x)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def table(file: Path) -> dict[str, dict[str, str]]:
    """The cells of an earlier run: mixer -> family -> cell."""
    text = file.read_text().partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]
    names, *rest = [row for row in rows if len(row) > 2]
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rest}


if __name__ == "__main__":
    main()
