"""Accuracy, work and time of a vision-language model against its number of visual tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.models.mqt import IGNORE, MQT
from zoo.tasks.vqa import VQA, VQAConfig


def decoder_flops(model: MQT, tokens: int, text: int) -> float:
    """Floating-point operations of the decoder's prefill: 2 · weights · positions, and attention.

    That is what the paper's figures count, embedding, tower and projector left out (the head is read at one position).
    """
    c = model.config.lm
    weights = sum(p.numel() for p in model.lm.backbone.parameters())
    length = tokens + text
    return 2.0 * weights * length + 2.0 * c.n_layer * c.d_model * length**2


def budgets_of(model: MQT, wanted: Sequence[int] = (), reduced: bool = False) -> tuple[int, ...]:
    """The numbers of visual tokens to measure: *wanted*, or powers of four up to the model's maximum.

    Raises:
        ZooError: the model's number of tokens is fixed and not *reduced*, or smaller than one asked for.
    """
    most = model.config.max_tokens
    if model.config.projector != "queries" and not reduced:
        raise ZooError(
            "this model makes one visual token a patch: there is no budget to choose, but --reduce names rules that "
            "leave some of them out"
        )
    above = next((m for m in wanted if not 1 <= m <= most), None)
    if above is not None:
        raise ZooError(f"the model makes 1 to {most} visual tokens, asked for {above}")
    return tuple(wanted) or tuple(m for m in (1, 2, 4, 16, 64, 256) if m <= most)


@torch.no_grad()
def budget_table(
    model: Any, loader: Any, wanted: Sequence[int] = (), reducers: Sequence[str] = (), repeats: int = 5
) -> list[dict[str, Any]]:
    """One row for each way to choose tokens and each number of them.

    The ways are `elastic`, the order of the query transformer (`all` for a model of one token a patch), and *reducers*,
    training-free rules of `MQT.visual_tokens`; pooling has rows only where its grid divides. `mflops` counts the whole
    pass on one prompt, `decoder_mflops` the decoder's prefill as the paper's figures do. `latency_ms` is the least of
    *repeats* whole passes on one prompt, tower included, `batch_ms` that of a batch divided by its samples.

    Raises:
        ZooError: the model is no MQT, or see `budgets_of`; a rule that this model's tower cannot serve.
    """
    if not isinstance(model, MQT):
        raise ZooError(f"a budget of visual tokens is measured for an MQT, not for a {type(model).__name__}")
    most, elastic = model.config.max_tokens, model.config.projector == "queries"
    budgets = budgets_of(model, wanted, bool(reducers))
    plans = [("elastic", "", m) for m in budgets] if elastic else [("all", "", most)]
    plans += [(kind, kind, m) for kind in reducers for m in budgets if kind != "pool" or pools(model, m)]
    task = VQA(model.eval(), VQAConfig()).eval()
    hits = dict.fromkeys(plans, 0)
    count, sample, largest = 0, None, None
    for batch in loader:
        batch = {key: torch.as_tensor(value) for key, value in batch.items()}
        largest = batch if largest is None else largest
        sample = {key: value[:1] for key, value in batch.items()} if sample is None else sample
        for way, kind, m in plans:
            hits[way, kind, m] += int(task.answer(batch, m if elastic or kind else None, kind)[1].sum())
        count += len(batch["ids"])
    if sample is None or largest is None:
        raise ZooError("the split holds no question")
    one = prompt_of(sample)
    many = {key: largest[key] for key in one}
    text = one["ids"].shape[1] - 1  # the placeholder is no text
    rows = []
    for way, kind, m in plans:
        ask = lambda b, m=m, kind=kind: model(b["ids"], b["pixels"], b["valid"], m=m, reducer=kind)
        with FlopCounterMode(display=False) as counter:
            ask(one)
        rows.append({
            "method": way, "tokens": m, "accuracy": hits[way, kind, m] / count,
            "decoder_mflops": decoder_flops(model, m, text) / 1e6, "mflops": counter.get_total_flops() / 1e6,
            "latency_ms": fastest(lambda ask=ask: ask(one), repeats),
            "batch_ms": fastest(lambda ask=ask: ask(many), repeats) / len(many["ids"]), "questions": count,
        })  # fmt: skip
    return rows


def prompt_of(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of one sample up to where its answer begins."""
    head = int((sample["labels"][0] == IGNORE)[sample["valid"][0]].sum())
    ids, valid = (sample[key][:, :head] for key in ("ids", "valid"))
    return {"ids": ids, "valid": valid, "pixels": sample["pixels"]}


def pools(model: MQT, m: int) -> bool:
    """Whether the model's tokens can be pooled to *m*."""
    side, small = round(model.config.max_tokens**0.5), round(m**0.5)
    return side**2 == model.config.max_tokens and small**2 == m and side % small == 0


def fastest(fn: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the fastest of *repeats* calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


def plot_budget(rows: Sequence[dict[str, Any]], out: str | Path, title: str = "", floor: float = 0.0) -> None:
    """Accuracy against visual tokens, a line for each method, with FLOPs and latency beside it, as a PNG.

    Args:
        rows: as `budget_table` makes them.
        out: file to write.
        title: above the panels.
        floor: accuracy to draw a dashed line at.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in rows))
    tokens = sorted({row["tokens"] for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = (("accuracy", "accuracy"), ("mflops", "MFLOPs a question"), ("latency_ms", "latency of one question, ms"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for method in methods:
            own = [row for row in rows if row["method"] == method and row.get(key) is not None]
            axis.plot([row["tokens"] for row in own], [row[key] for row in own], "o-", markersize=4, label=method)
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.set_xlabel("visual tokens")
        axis.set_ylabel(label)
        if key != "accuracy":
            axis.set_ylim(bottom=0)
    if floor:
        axes[0].axhline(floor, color="gray", linestyle="--", linewidth=1, label="question alone")
    if len(methods) > 1 or floor:
        axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
