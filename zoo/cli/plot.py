"""`zoo plot`: the curves of one or several runs in one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser
from zoo.errors import ZooError, nearest

KINDS = (".png", ".svg", ".pdf")


def parser() -> Parser:
    command = Parser(
        "plot",
        "Draw metrics.csv of one or several runs: a panel for each metric, a line for each run. RUN is the folder of\n"
        "a run, of a sweep (all its runs are drawn), of an artifact, or a metrics.csv.",
        [
            "zoo plot runs/splice",
            "zoo plot runs/a runs/b --metric val/mcc --out compare.svg",
            "zoo plot runs/grid --metric train/loss --smooth 0.95",
        ],
    )
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--metric", action="append", default=[], metavar="NAME", help="draw this one (repeatable)")
    command.add_argument("--smooth", type=float, default=0.0, metavar="X", help="exponential average (0 to below 1)")
    command.add_argument(
        "-o", "--out", default="curves.png", metavar="FILE", help="PNG, SVG or PDF (default: curves.png)"
    )
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.plots import read_metrics

    out = Path(args.out).expanduser()
    if out.suffix not in KINDS:
        raise ZooError(f"--out '{out}' must end in one of {', '.join(KINDS)}")
    if not 0 <= args.smooth < 1:
        raise ZooError(f"--smooth must be at least 0 and below 1, got {args.smooth}")
    files = find_runs(args.runs)
    series = {label: read_metrics(file) for label, file in files.items()}
    known = list(dict.fromkeys(name for one in series.values() for name in one))
    for name in args.metric:
        if name not in known:
            raise ZooError(f"no run has the metric '{name}'" + nearest(name, known))
    metrics = args.metric or [name for name in known if name.startswith("val/")] or known
    draw(series, metrics, out, args.smooth)
    print(f"{out}: {len(series)} runs, {', '.join(metrics)}")
    return 0


def find_runs(names: list[str]) -> dict[str, Path]:
    """Label -> metrics.csv of everything that *names* name.

    Raises:
        ZooError: a name that leads to no metrics.csv.
    """
    found: dict[str, Path] = {}
    for name in names:
        place = Path(name).expanduser()
        files = [place] if place.is_file() else [place / "metrics.csv"]
        if place.is_dir() and not files[0].is_file():
            files = sorted(place.glob("*/metrics.csv"))
        if not files or not files[0].is_file():
            raise ZooError(f"'{name}' holds no metrics.csv: it is not the folder of a run")
        for file in files:
            label = str(
                file.parent.name if file.parent.name not in ("", ".", "artifact") else file.parent.resolve().parent.name
            )
            found[label if label not in found else str(file.parent)] = file
    return found


def draw(
    series: dict[str, dict[str, tuple[list[int], list[float]]]], metrics: list[str], out: Path, keep: float
) -> None:
    """A panel for each of *metrics*, a line for each run of *series* that has it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1)
        for j, (label, one) in enumerate(series.items()):
            if metric not in one:
                continue
            steps, values = one[metric]
            marker = "o" if len(steps) < 40 else ""
            axes.plot(
                steps, smooth(values, keep), color=f"C{j % 10}", marker=marker, markersize=3, linewidth=1.2, label=label
            )
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False)
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise ZooError(f"cannot write '{out}': {error.strerror}") from None


def smooth(values: list[float], keep: float) -> list[float]:
    """Exponential average without the bias of its first values; keep=0 leaves them."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
