"""Accuracy, work and time of a vision-language model against its number of visual tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.models.mqt import MQT
from zoo.tasks.vqa import VQA, VQAConfig


def decoder_flops(model: MQT, tokens: int, text: int) -> float:
    """Floating-point operations of the decoder's prefill: 2 · weights · positions, and attention.

    That is what the paper's figures count, embedding, tower and projector left out (the head is read at one position).
    """
    c = model.config.lm
    weights = sum(p.numel() for p in model.lm.backbone.parameters())
    length = tokens + text
    return 2.0 * weights * length + 2.0 * c.n_layer * c.d_model * length**2


def budgets_of(model: MQT, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The numbers of visual tokens to measure: *wanted*, or powers of four up to the model's maximum.

    Raises:
        ZooError: the model's number of tokens is fixed, or smaller than one asked for.
    """
    most = getattr(model.projector, "max_tokens", 0)
    if not most:
        raise ZooError("this model makes one visual token a patch: there is no budget to choose")
    above = next((m for m in wanted if not 1 <= m <= most), None)
    if above is not None:
        raise ZooError(f"the model makes 1 to {most} visual tokens, asked for {above}")
    return tuple(wanted) or tuple(m for m in (1, 2, 4, 16, 64, 256) if m <= most)


@torch.inference_mode()
def budget_table(model: Any, loader: Any, wanted: Sequence[int] = (), repeats: int = 5) -> list[dict[str, float]]:
    """One row for each number of visual tokens: accuracy on the batches of *loader*, decoder FLOPs and latency.

    Latency is the least of *repeats* whole passes (tower included) on one sample.

    Raises:
        ZooError: the model is no MQT, or see `budgets_of`.
    """
    if not isinstance(model, MQT):
        raise ZooError(f"a budget of visual tokens is measured for an MQT, not for a {type(model).__name__}")
    budgets = budgets_of(model, wanted)
    task = VQA(model.eval(), VQAConfig(budgets=budgets)).eval()
    hits = dict.fromkeys(budgets, 0)
    count, sample = 0, None
    for batch in loader:
        batch = {key: torch.as_tensor(value) for key, value in batch.items()}
        sample = {key: value[:1] for key, value in batch.items()} if sample is None else sample
        for m in budgets:
            hits[m] += int(task.answer(batch, m)[1].sum())
        count += len(batch["ids"])
    if sample is None:
        raise ZooError("the split holds no question")
    text = int(sample["valid"].sum()) - 1  # the placeholder is no text
    rows = []
    for m in budgets:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            task.answer(sample, m)
            seconds.append(time.perf_counter() - began)
        rows.append({
            "tokens": m, "accuracy": hits[m] / count, "decoder_mflops": decoder_flops(model, m, text) / 1e6,
            "latency_ms": 1e3 * min(seconds), "questions": count,
        })  # fmt: skip
    return rows


def plot_budget(rows: Sequence[dict[str, float]], out: str | Path, title: str = "") -> None:
    """Accuracy against visual tokens, with latency and FLOPs beside it, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["tokens"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for axis, (key, label) in zip(
        axes,
        (("accuracy", "accuracy"), ("latency_ms", "latency a sample, ms"), ("decoder_mflops", "decoder MFLOPs")),
        strict=True,
    ):
        axis.plot(tokens, [row[key] for row in rows], "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.set_xlabel("visual tokens")
        axis.set_ylabel(label)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
