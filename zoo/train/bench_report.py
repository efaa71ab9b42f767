"""Tables of benchmark results: each model's mean and standard deviation over seeds, floors and published numbers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from zoo.train.bench import Row
from zoo.train.bench_baselines import BASELINES
from zoo.train.bench_suites import Suite

TITLES = {"lr": "regression (floor)", "cnn": "small CNN (floor)"}
NAMES = {"mcc": "MCC", "accuracy": "accuracy", "f1": "macro F1", "auroc": "AUROC"}


@dataclass(frozen=True)
class Cell:
    """Scores of one model on one set, in percent of the metric, in the order of the seeds."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def __str__(self) -> str:
        if len(self.scores) == 1:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {statistics.stdev(self.scores):.1f}"


def cells(rows: list[Row]) -> dict[str, dict[str, Cell]]:
    """set -> model -> cell."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        place = found.setdefault(row["set"], {}).setdefault(row["model"], [])
        place.append((int(row["seed"]), 100 * float(row["score"])))
    return {
        name: {model: Cell(tuple(score for _, score in sorted(pairs))) for model, pairs in models.items()}
        for name, models in found.items()
    }


def models_of(rows: list[Row]) -> list[str]:
    """The models of a file of results, the floors first."""
    names = sorted({row["model"] for row in rows})
    return [name for name in BASELINES if name in names] + [name for name in names if name not in BASELINES]


def table_rows(suite: Suite, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, one line a set): mean ± sd over seeds for each model; the best model's number is starred."""
    found, models = cells(rows), models_of(rows)
    header = ["set", "metric", *(TITLES.get(name, name) for name in models), "published"]
    lines = []
    for name, item in suite.sets.items():
        if name not in found:
            continue
        best = max(found[name].values(), key=lambda cell: cell.mean).mean
        line = [name, NAMES[item.metric]]
        for model in models:
            cell = found[name].get(model)
            line.append("–" if cell is None else f"{cell}{' *' if cell.mean == best else ''}")
        published = ", ".join(f"{model} {score:g}" for model, score in item.published.items())
        lines.append([*line, published or "–"])
    return header, lines


def markdown(suite: Suite, rows: list[Row]) -> str:
    """The table with a caption and the sources of the published numbers."""
    header, lines = table_rows(suite, rows)
    seeds = len({row["seed"] for row in rows})
    out = [
        f"{suite.title}. Test scores × 100, mean ± standard deviation over seeds ({seeds} at most; the regression has "
        "no chance in it); everything is chosen on the dev split. Best of a line: *.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---"] * len(header)) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    shown = {model for name in {row["set"] for row in rows} & set(suite.sets) for model in suite.sets[name].published}
    if shown:
        out += ["", "Published numbers:", ""]
        out += [f"- {model}: {source}" for model, source in suite.sources.items() if model in shown]
    return "\n".join(out) + "\n"
