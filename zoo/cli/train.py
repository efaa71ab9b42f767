"""`zoo train`: a recipe, its overrides, one run or a grid of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, table
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.train.recipe import RecipeConfig
    from zoo.train.run import RunResult


def parser() -> Parser:
    command = Parser(
        "train",
        "Train a recipe into a folder: checkpoints, metrics.csv, curves.png and the artifact.",
        [
            "zoo train hyenadna_uci_splice",
            "zoo train hyenadna_uci_splice data=chr20_splice model.max_len=402 --out runs/chr20",
            "zoo train my.yaml --dry-run",
            "zoo train hyenadna_uci_splice --out runs/hyenadna_uci_splice --resume",
            "zoo train hyenadna_uci_splice -m seed=0,1,2 task.optim.lr=1e-3,2e-3 --out runs/grid",
        ],
    )
    command.add_argument("recipe", metavar="RECIPE", help="name of a recipe (`zoo recipes ls`), or a YAML file")
    add_run_options(command)
    command.add_argument("-m", "--multirun", action="store_true", help="run every combination of listed values")
    return command


def add_run_options(command: Parser) -> None:
    """Options that `train` and `finetune` share."""
    command.add_overrides()
    command.add_argument("-o", "--out", metavar="DIR", help="folder of the run (default: runs/ and the recipe's name)")
    command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint that verifies")
    command.add_argument("--dry-run", action="store_true", help="show what would be run, and train nothing")


def run(args: argparse.Namespace) -> int:
    from zoo.train.compose import compose, sweep
    from zoo.train.recipe import validate

    if not args.multirun:
        recipe = validate(compose(args.recipe, args.overrides))
        return run_one(recipe, args)
    grid = sweep(args.overrides)
    if len(grid) == 1:
        raise ZooError("-m needs an override that lists several values, as in seed=0,1,2")
    runs = [(overrides, validate(compose(args.recipe, overrides))) for overrides in grid]  # all before the first trains
    return run_grid(runs, args)


def run_one(recipe: RecipeConfig, args: argparse.Namespace) -> int:
    """Train (or describe) one validated recipe."""
    if args.dry_run:
        from zoo.cli.dryrun import describe

        print(describe(recipe))
        return 0
    out = Path(args.out or Path("runs") / recipe.name)
    result = _train(recipe, out, args.resume)
    if result.first:
        print(summary(result))
    return 0


def run_grid(runs: list[tuple[list[str], RecipeConfig]], args: argparse.Namespace) -> int:
    """One sub-folder for each combination, and a table of the metrics at the end."""
    base = Path(args.out or Path("runs") / runs[0][1].name)
    names = labels([overrides for overrides, _ in runs])
    rows: list[tuple[str, dict[str, float]]] = []
    for label, (_, recipe) in zip(names, runs, strict=True):
        if args.dry_run:
            from zoo.cli.dryrun import describe

            print(f"# {label}\n{describe(recipe)}\n")
            continue
        result = _train(recipe, base / label.replace("/", "_"), args.resume)
        rows.append((label, result.metrics))
    if rows and result.first:
        report(rows, base)
    return 0


def labels(grid: list[list[str]]) -> list[str]:
    """A name for each combination: the overrides in which it differs from the others."""
    varied = [i for i in range(len(grid[0])) if len({overrides[i] for overrides in grid}) > 1]
    return [",".join(overrides[i] for i in varied) for overrides in grid]


def report(rows: list[tuple[str, dict[str, float]]], base: Path) -> None:
    """The table of a grid's metrics, on the screen and in sweep.txt."""
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    cells = [(label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)) for label, metrics in rows]
    text = table(cells, ("run", *names), right=range(1, len(names) + 1))
    (base / "sweep.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"{len(rows)} runs in {base}")


def _train(recipe: RecipeConfig, out: Path, resume: bool) -> RunResult:
    from zoo.train.run import train

    return train(recipe, out, resume=resume)


def summary(result: Any) -> str:
    """Metrics and where things are, after a run."""
    rows = [(name, f"{value:.4f}") for name, value in result.metrics.items()]
    lines = [table(rows, ("metric", "value"), right=(1,))] if rows else []
    lines.append(f"{result.steps} steps in {result.seconds:.0f} s; weights of step {result.chosen}")
    lines.append(f"artifact  {result.artifact}")
    lines.append(f"card      {result.artifact / 'README.md'}")
    lines.append(f"curves    {result.dir / 'curves.png'}")
    return "\n".join(lines)
