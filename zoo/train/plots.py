"""The curves of a run as a picture, drawn from its `metrics.csv`."""

from __future__ import annotations

import csv
from pathlib import Path

from zoo.errors import ZooError

Series = dict[str, tuple[list[int], list[float]]]


def read_metrics(path: Path) -> Series:
    """`{metric: (steps, values)}` of a metrics.csv.

    Raises:
        ZooError: the file is missing or has no `step` column.
    """
    if not path.is_file():
        raise ZooError(f"{path} does not exist: a run writes it while it trains")
    series: Series = {}
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if "step" not in (reader.fieldnames or []):
            raise ZooError(f"{path} is not the metrics of a run: it has no 'step' column")
        for row in reader:
            for name, value in row.items():
                if name not in ("step", "seconds") and value:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return series


def plot_curves(metrics: Path, picture: Path, title: str = "") -> Path:
    """Draw losses and validation metrics of *metrics* (a metrics.csv) into *picture* (PNG or SVG); returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    groups = _groups(series)
    figure = Figure(figsize=(4.2 * max(len(groups), 1), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (label, names) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), column + 1)
        for name in names:
            steps, values = series[name]
            marker = "o" if len(steps) < 40 else ""
            raw = axes.plot(steps, values, marker=marker, markersize=3, linewidth=1, label=name)[0]
            if name == "train/loss" and len(values) > 20:
                raw.set_alpha(0.3)
                raw.set_label("_")
                axes.plot(steps, _smooth(values), color=raw.get_color(), linewidth=1.5, label=name)
        axes.set_xlabel("optimiser step")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(picture, dpi=120)
    return picture


def _groups(series: Series) -> dict[str, list[str]]:
    """Panels: the losses together, scores between 0 and 1 together, every other validation metric by itself."""
    losses = [name for name in series if name.endswith("/loss")]
    groups = {"loss": losses} if losses else {}
    others = [name for name in series if name.startswith("val/") and name not in losses]
    scores = [name for name in others if all(-1 <= value <= 1 for value in series[name][1])]
    if scores:
        groups["validation scores"] = scores
    groups |= {name: [name] for name in others if name not in scores}
    if "train/lr" in series:
        groups["learning rate"] = ["train/lr"]
    return groups


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential average without the bias of its first values."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
