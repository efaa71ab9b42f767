"""Run a benchmark suite: every model on every set with every seed, one CSV row each, done rows never run again."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, ZooError, nearest
from zoo.train.bench_baselines import BASELINES
from zoo.train.bench_suites import BenchSet, Suite, section, write_atomic

COLUMNS = (
    "suite",
    "set",
    "model",
    "seed",
    "metric",
    "score",
    "val_score",
    "accuracy",
    "mcc",
    "f1",
    "parameters",
    "steps",
    "seconds",
    "choice",
)
Row = dict[str, str]
# fields of a recipe's data section that say how to read rows rather than which: they stay when the set is replaced
READING = (
    "max_len",
    "truncate",
    "pad_side",
    "pad_to",
    "add_special",
    "rc_augment",
    "rc_views",
    "frames",
    "class_weights",
    "batch_size",
    "eval_batch_size",
    "bucket",
    "num_workers",
    "limit",
)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        suite, sets: the data.
        models: recipes, prefixes of recipes, or baselines; see `recipe_for`.
        seeds: of each (model, set).
        out: folder of the results: `<suite>.csv`.
        root: folder of the suite's files; None for those in the catalogue or on the Hub.
        init: artifact that every recipe starts from.
        overrides: changes to every recipe.
        keep: folder in which the runs and their artifacts stay; None drops them.
    """

    suite: Suite
    sets: list[BenchSet]
    models: list[str]
    seeds: list[int]
    out: Path
    root: Path | None = None
    init: str | None = None
    overrides: tuple[str, ...] = ()
    keep: Path | None = None

    @property
    def results(self) -> Path:
        return self.out / f"{self.suite.name}.csv"


def default_models(sets: list[BenchSet]) -> list[str]:
    """The prefixes P for which the catalogue has recipes `P_<set>` of the sets."""
    from zoo.train.compose import recipe_names

    ends = tuple(f"_{item.name}" for item in sets)
    found = {name.removesuffix(end) for name in recipe_names() for end in ends if name.endswith(end)}
    return sorted(found)


def recipe_for(model: str, item: BenchSet) -> tuple[str, bool]:
    """The recipe that *model* means on a set, and whether it was written for that set.

    `hyenadna` on species5 is the recipe hyenadna_species5 if there is one; a full name or a YAML file is that recipe,
    with the set's data put in.

    Raises:
        ConfigError: no such recipe.
    """
    from zoo.train.compose import find, recipe_names

    names = recipe_names()
    if f"{model}_{item.name}" in names:
        return f"{model}_{item.name}", True
    if model in names or model.endswith(".yaml"):
        return find(model).name if model in names else model, model.endswith(f"_{item.name}")
    near = nearest(model, [*names, *BASELINES])
    raise ConfigError(f"'{model}' is neither a recipe, a baseline, nor the start of a recipe for {item.name}" + near)


def check(plan: Plan) -> None:
    """Refuse, before anything runs, models that name nothing.

    Raises:
        ConfigError: see `recipe_for`.
    """
    for item in plan.sets:
        for model in plan.models:
            if model not in BASELINES:
                recipe_for(model, item)


def jobs(plan: Plan) -> list[tuple[BenchSet, str, int]]:
    """All (set, model, seed) in the order they run: baselines first, then seed by seed. The regression has one seed."""
    ordered = sorted(plan.models, key=lambda model: model not in BASELINES)
    found = []
    for item in plan.sets:
        found += [(item, model, seed) for model in ordered if model in BASELINES for seed in plan.seeds]
        found += [(item, model, seed) for seed in plan.seeds for model in ordered if model not in BASELINES]
    return [(item, model, seed) for item, model, seed in found if model != "lr" or seed == plan.seeds[0]]


def label(plan: Plan, model: str) -> str:
    """How a model is called in the results."""
    name = Path(model).stem if model.endswith(".yaml") else model
    if plan.init is None or model in BASELINES:
        return name
    start = Path(plan.init)
    return f"{name} from {start.parent.name if start.name == 'artifact' else start.name}"


def run(plan: Plan, report: Callable[[str], None]) -> list[Row]:
    """Run what the results file does not hold yet; *report* is called with one line a job. All rows of the file.

    Raises:
        ZooError: a data set cannot be read, a recipe does not fit it, or the results cannot be written.
    """
    check(plan)
    todo = jobs(plan)
    sections: dict[str, dict[str, Any]] = {}
    for number, (item, model, seed) in enumerate(todo, 1):
        name = label(plan, model)
        what = f"[{number}/{len(todo)}] {item.name} {name} seed {seed}"
        if (item.name, name, str(seed)) in {key(row) for row in read_results(plan.results)}:
            report(f"{what}: done before")
            continue
        if item.name not in sections:
            sections[item.name] = section(plan.suite, item, plan.root, plan.out / "data")
        row = run_one(plan, item, model, seed, sections[item.name])
        append(plan.results, row)
        report(f"{what}: {row['metric']} {100 * float(row['score']):.1f} in {float(row['seconds']):.0f} s")
    return read_results(plan.results)


def run_one(plan: Plan, item: BenchSet, model: str, seed: int, data: dict[str, Any]) -> Row:
    """Train and measure one model with one seed on one set."""
    row: dict[str, Any] = {"suite": plan.suite.name, "set": item.name, "model": label(plan, model), "seed": seed}
    if model in BASELINES:
        from zoo.train.bench_baselines import fit

        fitted = fit(model, data, seed)
        val, test = fitted.val, fitted.test
        row |= {"parameters": fitted.parameters, "seconds": fitted.seconds, "choice": fitted.choice, "steps": ""}
    else:
        val, test, extra = train_one(plan, item, model, seed, data)
        row |= extra
    row |= {"metric": item.metric, "score": test[item.metric], "val_score": val.get(item.metric, "")}
    row |= {name: test.get(name, "") for name in ("accuracy", "mcc", "f1")}
    return {name: _text(row[name]) for name in COLUMNS}


def train_one(
    plan: Plan, item: BenchSet, model: str, seed: int, data: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """(val metrics, test metrics, other columns) of one training run."""
    from zoo.train.recipe import validate
    from zoo.train.run import train

    start = {} if plan.init is None else {"init": plan.init}  # a probe or adapters are refused without
    recipe = validate({**compose_for(plan, item, model, data), "seed": seed, **start})
    place = plan.keep / item.name / label(plan, model) / f"seed{seed}" if plan.keep else None
    folder = place or Path(tempfile.mkdtemp(prefix="zoo-bench-"))
    try:
        result = train(recipe, folder, resume=place is not None and (folder / "checkpoints").is_dir(), init=plan.init)
        parameters = json.loads((result.artifact / "run.json").read_text(encoding="utf-8"))["parameters"]
    finally:
        if place is None:
            shutil.rmtree(folder, ignore_errors=True)
    split = {
        stage: {
            name.removeprefix(f"{stage}/"): value for name, value in result.metrics.items() if name.startswith(stage)
        }
        for stage in ("val", "test")
    }
    if item.metric not in split["test"]:
        raise ZooError(f"recipe '{recipe.name}' does not measure {item.metric} on test, the metric of {item.name}")
    extra = {
        "parameters": parameters,
        "steps": result.steps,
        "seconds": result.seconds,
        "choice": f"step {result.chosen} of {result.steps}",
    }
    return split["val"], split["test"], extra


def compose_for(plan: Plan, item: BenchSet, model: str, data: dict[str, Any]) -> dict[str, Any]:
    """The composed recipe with the set's files; one written for another set gets the right outputs and length too."""
    from zoo.train.compose import compose

    name, own = recipe_for(model, item)
    recipe = compose(name, list(plan.overrides))
    reading = {key: value for key, value in recipe["data"].items() if key in READING}
    recipe["data"] = {**data, **reading}
    if not own:
        recipe["model"].setdefault("head", {})
        recipe["model"]["head"] = {"pooling": "mean", **recipe["model"]["head"], "kind": "sequence"}
        recipe["model"]["head"]["num_outputs"] = item.classes
        limit = recipe["model"].get("max_len")
        if limit is not None and limit < item.length + 2:
            recipe["model"]["max_len"] = item.length + 2
    return recipe


def key(row: Row) -> tuple[str, str, str]:
    """What a row is the result of: set, model, seed."""
    return row["set"], row["model"], row["seed"]


def read_results(path: Path) -> list[Row]:
    """The rows of a results file, none where there is no file.

    Raises:
        ZooError: it is not one.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ZooError(f"'{path}' is not a file of benchmark results: it has no column '{sorted(missing)[0]}'")
        return [dict(row) for row in reader]


def append(path: Path, row: Row) -> None:
    """Add a row to a results file. Several processes may share one file; a reader never sees half a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        rows = [old for old in read_results(path) if key(old) != key(row)]
        rows = sorted([*rows, row], key=lambda r: (r["set"], r["model"], int(r["seed"])))
        write_atomic(path, COLUMNS, ([r[name] for name in COLUMNS] for r in rows))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(f".{path.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
