"""Accuracy, work and time of a vision-language model against its number of visual tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.models.mqt import IGNORE, MQT, REDUCERS
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


class Plan(NamedTuple):
    """One way to choose visual tokens, and how many.

    Attributes:
        method: `elastic`, the order of the query transformer; `all`, one token a patch; or the name of a rule.
        tokens: m.
    """

    method: str
    tokens: int

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `MQT.visual_tokens`."""
        return {"m": self.tokens, "reducer": self.method if self.method in REDUCERS else ""}


def plans_of(model: MQT, wanted: Sequence[int] = (), reducers: Sequence[str] = ()) -> list[Plan]:
    """What `budget_table` measures; pooling only where its grid divides.

    Raises:
        ZooError: see `budgets_of`.
    """
    most, elastic = model.config.max_tokens, model.config.projector == "queries"
    budgets = budgets_of(model, wanted, bool(reducers))
    own = [Plan("elastic", m) for m in budgets] if elastic else [Plan("all", most)]
    return own + [Plan(kind, m) for kind in reducers for m in budgets if kind != "pool" or pools(model, m)]


@torch.inference_mode()
def accuracies(model: MQT, loader: Any, plans: Sequence[Plan]) -> tuple[list[float], int]:
    """Share of right answers of each plan on the batches of *loader*, and how many questions those hold.

    Raises:
        ZooError: no question at all, or a rule that this model's tower cannot serve.
    """
    task = VQA(model.eval(), VQAConfig()).eval()
    hits, count = [0] * len(plans), 0
    for batch in loader:
        batch = {key: torch.as_tensor(value) for key, value in batch.items()}
        for i, plan in enumerate(plans):
            hits[i] += int(task.answer(batch, **plan.asked)[1].sum())
        count += len(batch["ids"])
    if not count:
        raise ZooError("the split holds no question")
    return [found / count for found in hits], count


@torch.no_grad()
def costs(model: MQT, batch: dict[str, Any], plans: Sequence[Plan], repeats: int = 5) -> list[dict[str, float]]:
    """Work and time of each plan on the prompts of a batch, tower included.

    `mflops` counts the pass on one prompt, `decoder_mflops` the decoder's prefill as the paper's figures do.
    `latency_ms` is the least of *repeats* passes on one prompt; `batch_ms` that of a few on all of them, divided by
    their number.
    """
    model.eval()
    many = {key: torch.as_tensor(value) for key, value in batch.items()}
    one = prompt_of({key: value[:1] for key, value in many.items()})
    several = {key: many[key] for key in one}
    text = one["ids"].shape[1] - 1  # the placeholder is no text
    found = []
    for plan in plans:
        ask = lambda inputs, plan=plan: model(**inputs, **plan.asked)
        with FlopCounterMode(display=False) as counter:
            ask(one)
        found.append({
            "decoder_mflops": decoder_flops(model, plan.tokens, text) / 1e6,
            "mflops": counter.get_total_flops() / 1e6,
            "latency_ms": fastest(ask, one, repeats),
            "batch_ms": fastest(ask, several, max(repeats // 8, 2)) / len(several["ids"]),
        })  # fmt: skip
    return found


def budget_table(
    model: Any, loader: Any, wanted: Sequence[int] = (), reducers: Sequence[str] = (), repeats: int = 5
) -> list[dict[str, Any]]:
    """One row for each plan: `method`, `tokens`, `accuracy`, what `costs` gives, and `questions`.

    Raises:
        ZooError: the model is no MQT; see `budgets_of` and `accuracies`.
    """
    if not isinstance(model, MQT):
        raise ZooError(f"a budget of visual tokens is measured for an MQT, not for a {type(model).__name__}")
    plans = plans_of(model, wanted, reducers)
    right, count = accuracies(model, loader, plans)
    work = costs(model, next(iter(loader)), plans, repeats)
    return [
        {"method": plan.method, "tokens": plan.tokens, "accuracy": accuracy, **cost, "questions": count}
        for plan, accuracy, cost in zip(plans, right, work, strict=True)
    ]


def prompt_of(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of one sample up to where its answer begins."""
    head = int((sample["labels"][0] == IGNORE)[sample["valid"][0]].sum())
    ids, valid = (sample[key][:, :head] for key in ("ids", "valid"))
    return {"ids": ids, "valid": valid, "pixels": sample["pixels"]}


def pools(model: MQT, m: int) -> bool:
    """Whether the model's tokens can be pooled to *m*."""
    side, small = round(model.config.max_tokens**0.5), round(m**0.5)
    return side**2 == model.config.max_tokens and small**2 == m and side % small == 0


def fastest(fn: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    """Milliseconds of the fastest of *repeats* calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        fn(argument)
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
