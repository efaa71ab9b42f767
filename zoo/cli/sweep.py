"""`zoo sweep`: a recipe over a grid of values, or over values that Optuna chooses."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

from zoo.cli import launch
from zoo.cli.common import Parser, table
from zoo.errors import ZooError

RANGE = re.compile(r"(int|float|log):([^:]+):([^:]+)")


def parser() -> Parser:
    command = Parser(
        "sweep",
        "Train RECIPE for every combination of listed values (key=a,b,c). With --trials N, Optuna (extra: optuna)\n"
        "chooses N times among listed values and from ranges: key=log:1e-4:1e-2, key=float:0:0.5, key=int:1:8.\n"
        "A table of all runs ends it, the best first where the recipe names a metric to monitor.",
        [
            "zoo sweep hyenadna_uci_splice task.optim.lr=1e-3,2e-3 seed=0,1",
            "zoo sweep hyenadna_uci_splice task.optim.lr=log:1e-4:1e-2 model.n_layer=int:1:4 --trials 20",
            "zoo sweep hyenadna_uci_splice task.optim.lr=log:1e-4:1e-2 --trials 40 --resume",
            "zoo sweep hyenadna_uci_splice seed=0,1,2,3 --launcher submitit --parallel 2 --job cpus_per_task=4",
        ],
    )
    command.add_argument("recipe", metavar="RECIPE")
    command.add_overrides()
    command.add_argument("--trials", type=int, default=0, metavar="N", help="let Optuna choose N times")
    command.add_argument("--metric", metavar="NAME", help="what to improve (default: the recipe's trainer.monitor)")
    command.add_argument("--mode", choices=("min", "max"), help="default: the recipe's trainer.mode")
    command.add_argument("--seed", type=int, default=0, help="of Optuna's choices")
    command.add_argument(
        "-o", "--out", metavar="DIR", help="one folder for each run (default: runs/ and the recipe's name)"
    )
    command.add_argument("--resume", action="store_true", help="keep the runs that are there and go on")
    command.add_argument("--dry-run", action="store_true", help="show the runs of the grid, train nothing")
    launch.add_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.compose import compose, sweep
    from zoo.train.recipe import validate

    ranged = [text for text in args.overrides if RANGE.fullmatch(text.partition("=")[2])]
    if args.trials:
        return search(args)
    if ranged:
        raise ZooError(f"'{ranged[0]}' is a range: say how often to choose from it, as in --trials 20")
    grid = sweep(args.overrides)
    if len(grid) == 1:
        raise ZooError("a sweep needs a key with several values, as in seed=0,1,2, or --trials with ranges")
    from zoo.cli.train import run_grid

    runs = [(overrides, validate(compose(args.recipe, overrides))) for overrides in grid]
    if args.launcher and not args.dry_run:
        return launched(args, grid, runs[0][1].name)
    return run_grid(runs, args)


def launched(args: argparse.Namespace, grid: list[list[str]], name: str) -> int:
    """The grid as jobs; 1 where some of them failed, whose sentences are printed before the table of the others."""
    from zoo.cli.train import labels, report

    base = Path(args.out or Path("runs") / name)
    folders = {label: base / label.replace("/", "_") for label in labels(grid)}
    there = next((place for place in folders.values() if place.exists()), None)
    if there is not None and not args.resume:
        raise ZooError(f"'{there}' exists: go on with --resume, or choose another --out")
    found = _outcomes(args, dict(zip(folders, grid, strict=True)), folders, base)
    for label, outcome in found.items():
        if isinstance(outcome, ZooError):
            print(f"{label}: {outcome}", file=sys.stderr)
    rows = [(label, found[label]) for label in folders if not isinstance(found[label], ZooError)]
    if rows:
        report(rows, base)  # type: ignore[arg-type]
    return int(len(rows) < len(folders))


def _outcomes(
    args: argparse.Namespace, runs: dict[str, list[str]], folders: dict[str, Path], base: Path
) -> dict[str, launch.Outcome]:
    from zoo.train.compose import compose

    jobs = {
        label: launch.Job(compose(args.recipe, overrides), str(folders[label].absolute()), folders[label].exists())
        for label, overrides in runs.items()
    }
    return launch.launch(args.launcher, jobs, base.absolute(), args.parallel, args.job)


def search(args: argparse.Namespace) -> int:
    """Optuna's choice of overrides, one run each, and a table of them by the metric."""
    from zoo.train.compose import compose
    from zoo.train.recipe import validate

    fixed, free = split(args.overrides)
    first = validate(compose(args.recipe, [*fixed, *(f"{key}={middle(spec)}" for key, spec in free.items())]))
    metric, mode = args.metric or first.trainer.monitor, args.mode or first.trainer.mode
    if metric is None:
        raise ZooError("the recipe monitors no metric: name one with --metric, as in --metric val/loss --mode min")
    base = Path(args.out or Path("runs") / f"{first.name}_sweep")
    if args.dry_run:
        print(f"{args.trials} trials of {', '.join(free)} for the {mode} of {metric}, in {base}")
        return 0
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ZooError("--trials needs Optuna, which is not installed: pip install 'seqzoo[optuna]'") from None
    journal = base / "study.log"
    if journal.exists() and not args.resume:
        raise ZooError(f"'{base}' holds a sweep: go on with --resume, or choose another --out")
    base.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    done = len(optuna.load_study(study_name="sweep", storage=storage).trials) if journal.stat().st_size else 0
    study = optuna.create_study(
        study_name="sweep", storage=storage, load_if_exists=True,
        direction="maximize" if mode == "max" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=args.seed + done),
    )  # fmt: skip
    left, failed = args.trials - sum(trial.value is not None for trial in study.trials), 0
    while left > 0:
        trials = [study.ask() for _ in range(min(left, args.parallel if args.launcher else 1))]
        left -= len(trials)
        chosen = {
            f"trial{trial.number:03d}": [*fixed, *(f"{key}={suggest(trial, key, spec)}" for key, spec in free.items())]
            for trial in trials
        }
        folders = {name: base / name for name in chosen}
        found = (
            _outcomes(args, chosen, folders, base)
            if args.launcher
            else {name: _train(args.recipe, overrides, folders[name]) for name, overrides in chosen.items()}
        )
        for trial in trials:
            metrics = found[f"trial{trial.number:03d}"]
            if isinstance(metrics, ZooError):
                print(f"trial{trial.number:03d}: {metrics}", file=sys.stderr)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                failed += 1
                continue
            if metric not in metrics:
                raise ZooError(f"the runs have no metric '{metric}' (they have: {', '.join(metrics)})")
            trial.set_user_attr("metrics", metrics)
            study.tell(trial, metrics[metric])
        _report(study, list(free), metric, mode, base, say=False)
    _report(study, list(free), metric, mode, base, say=True)
    return int(failed > 0)


def split(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """Overrides with one value, and those with a range or a list.

    Raises:
        ZooError: nothing to choose from, or a range that is none.
    """
    from zoo.train.compose import sweep

    fixed: list[str] = []
    free: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        match = RANGE.fullmatch(value)
        if match:
            low, high = numbers(match[1], match[2], match[3], text)
            if not low < high or (match[1] == "log" and low <= 0):
                raise ZooError(f"'{text}' is no range: the first number must be the smaller one, and log's above 0")
            free[key] = value
        elif len(choices := sweep([text])) > 1:
            free[key] = "choice:" + "\0".join(choice[0].partition("=")[2] for choice in choices)
        else:
            fixed.append(text)
    if not free:
        raise ZooError("--trials needs something to choose: key=log:1e-4:1e-2, key=int:1:8 or key=a,b,c")
    return fixed, free


def numbers(kind: str, low: str, high: str, text: str) -> tuple[float, float]:
    """The ends of a range."""
    try:
        return (int(low), int(high)) if kind == "int" else (float(low), float(high))
    except ValueError:
        raise ZooError(f"'{text}' is no range: it should read key={kind}:1:8, with numbers") from None


def middle(spec: str) -> str:
    """A value of the range or list, to check that the recipe takes it."""
    kind, _, rest = spec.partition(":")
    return rest.split("\0")[0] if kind == "choice" else rest.split(":")[0]


def suggest(trial: Any, key: str, spec: str) -> Any:
    """Optuna's choice for *key*."""
    kind, _, rest = spec.partition(":")
    if kind == "choice":
        return trial.suggest_categorical(key, rest.split("\0"))
    first, last = rest.split(":")
    low, high = numbers(kind, first, last, spec)
    if kind == "int":
        return trial.suggest_int(key, int(low), int(high))
    return trial.suggest_float(key, low, high, log=kind == "log")


def _train(recipe: str, overrides: list[str], out: Path) -> dict[str, float]:
    from zoo.train.compose import compose
    from zoo.train.recipe import validate
    from zoo.train.run import train

    return train(validate(compose(recipe, overrides)), out, resume=out.exists()).metrics


def _report(study: Any, keys: list[str], metric: str, mode: str, base: Path, say: bool) -> None:
    """sweep.csv and the table, the best first."""
    trials = [trial for trial in study.trials if trial.value is not None]
    trials.sort(key=lambda trial: trial.value, reverse=mode == "max")
    others = list(
        dict.fromkeys(name for trial in trials for name in trial.user_attrs.get("metrics", {}) if name != metric)
    )
    header = ["run", *keys, metric, *others]
    rows = []
    for trial in trials:
        metrics = trial.user_attrs.get("metrics", {})
        values = [
            f"{value:.4g}" if isinstance(value, float) else value for value in (trial.params[key] for key in keys)
        ]
        rows.append([f"trial{trial.number:03d}", *values, f"{trial.value:.4f}",
                     *(f"{metrics[name]:.4f}" if name in metrics else "" for name in others)])  # fmt: skip
    with (base / "sweep.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    if say:
        print(table(rows, header, right=range(1, len(header))))
        best = f"; the best is {base / rows[0][0] / 'artifact'}" if rows else ""
        print(f"{len(rows)} runs in {base}{best}")
