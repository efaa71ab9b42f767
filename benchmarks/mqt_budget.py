"""One model for every number of visual tokens, against models of one number each and against training-free rules.

Everything is trained by the recipe `mqt_easy_vqa` with the same steps, data and sizes: the elastic model; one model
for each fixed number; and one of LLaVA-1.5's shape, a token a patch, which the rules (HiRED, GlobalCom², M3's pooling)
reduce. The rules reduce the elastic model's own tokens too. `two stages` makes the model of patches elastic: a query
transformer between its frozen parts, then adapters in its decoder. Accuracies are those of the whole test split.

    python benchmarks/mqt_budget.py --work runs/mqt_budget                 trains what is missing, measures, draws
    python benchmarks/mqt_budget.py --work runs/mqt_budget accuracy    one part: train, accuracy, latency, report
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, machine, save, table

from zoo import datamodules
from zoo.datamodules.vqa import easy_vqa
from zoo.hub import artifact
from zoo.models.mqt import REDUCERS
from zoo.train.budget import Plan, accuracies, costs, plans_of, plot_budget

BUDGETS = (1, 2, 4, 16, 64)
FIXED = (1, 4, 16, 64)
RECIPE = "mqt_easy_vqa"
# folder of the run -> recipe and overrides; an earlier run is named {folder}
RUNS: dict[str, tuple[str, list[str]]] = {
    "elastic": (RECIPE, []),
    **{f"fixed{m}": (RECIPE, [f"task.tokens={m}", f"task.budgets=[{m}]"]) for m in FIXED},
    "mlp": (f"{RECIPE}_patches", []),
    "stage1": (f"{RECIPE}_stage1", ["task.tower={mlp}", "task.lm={mlp}"]),
    "stage2": (f"{RECIPE}_stage2", ["init={stage1}"]),
}


def train(work: Path) -> None:
    """Train every run whose artifact is not there."""
    from zoo.train.compose import compose
    from zoo.train.recipe import validate
    from zoo.train.run import train as run

    places = {name: str(work.resolve() / name / "artifact") for name in RUNS}
    for name, (recipe, overrides) in RUNS.items():
        if not Path(places[name]).is_dir():
            run(validate(compose(recipe, [text.format(**places) for text in overrides])), work / name)


def plans(name: str, model: Any) -> list[Plan]:
    """What is measured of a run."""
    if name.startswith("fixed"):
        return [Plan("elastic", int(name.removeprefix("fixed")))]
    if name.startswith("stage"):
        return plans_of(model, BUDGETS if name == "stage2" else BUDGETS[-1:])
    # a rule that keeps every token changes nothing
    found = plans_of(model, BUDGETS, REDUCERS)
    return [plan for plan in found if plan.method not in REDUCERS or plan.tokens < BUDGETS[-1]]


def label(name: str, plan: Plan) -> str:
    """What a row is called."""
    if plan.method in REDUCERS:
        return f"{plan.method} of {'queries' if name == 'elastic' else 'patches'}"
    called = {"elastic": "elastic", "mlp": "every patch", "stage1": "stage 1 alone", "stage2": "two stages"}
    return called.get(name, "one model each")


def each(work: Path) -> Any:
    """(name, artifact) of every run that is trained."""
    for name in RUNS:
        if (work / name / "artifact").is_dir():
            yield name, artifact.load(str(work / name / "artifact"))


def accuracy(work: Path) -> None:
    """Accuracies on the test split, kept in the work folder run by run."""
    file = work / "accuracy.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    for name, found in each(work):
        if name in kept:
            continue
        run = found.run
        # what the run measured itself, when it ended, on the same split
        known = {f"test/accuracy_{plan.tokens}": plan for plan in plans(name, found.model) if not plan.asked["reducer"]}
        values = {plan: run["metrics"][key] for key, plan in known.items() if key in run["metrics"]}
        wanted = [plan for plan in plans(name, found.model) if plan not in values]
        if wanted:
            data = datamodules.build(datamodules.section("easy_vqa", batch_size=64), found.tokenizer)
            right, _ = accuracies(found.model, data.loader("test", train=False), wanted)
            values |= dict(zip(wanted, right, strict=True))
        rows = [[*plan, values[plan]] for plan in plans(name, found.model)]
        kept[name] = {"rows": rows, "steps": run["steps"], "seed": run["seed"]}
        file.write_text(json.dumps(kept, indent=1))
        print(name, json.dumps(kept[name]["rows"]), flush=True)


def latency(work: Path, repeats: int) -> None:
    """Work and time of every plan, the lesser of two rounds; weights do not matter, so untrained models will do."""
    from zoo.tokenizers import build
    from zoo.train.assemble import build_model, model_config
    from zoo.train.compose import compose

    torch.set_num_threads(1)
    made: dict[str, list[list[Any]]] = {}
    for _ in range(2):
        for name in ("elastic", "mlp"):
            section = compose(*RUNS[name])
            model = build_model("mqt", model_config(section["model"]))
            data = datamodules.build(datamodules.section("easy_vqa", limit=64), build(section["tokenizer"]))
            data.setup()
            batch = data.sources["test"].batch(np.arange(64), 0, 0)
            wanted = plans(name, model)
            rows = [[*plan, cost] for plan, cost in zip(wanted, costs(model, batch, wanted, repeats), strict=True)]
            for old, new in zip(made.get(name, []), rows, strict=False):
                for key in ("latency_ms", "batch_ms"):
                    new[2][key] = min(old[2][key], new[2][key])
            made[name] = rows
    (work / "latency.json").write_text(json.dumps({"machine": machine(), "rows": made}, indent=1))


def floor() -> float:
    """Share of test answers that the most frequent training answer to the same question gets right."""
    parts = easy_vqa()
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in parts["train"]:
        seen[question.question][question.answer] += 1
    guesses = {text: answers.most_common(1)[0][0] for text, answers in seen.items()}
    return float(np.mean([guesses.get(q.question) == q.answer for q in parts["test"]]))


def report(work: Path) -> None:
    """Table, CSV, JSON and plot of what was measured."""
    kept, timed = (json.loads((work / f"{part}.json").read_text()) for part in ("accuracy", "latency"))
    cost = {(name, method, m): found for name, rows in timed["rows"].items() for method, m, found in rows}
    rows = []
    for name, found in kept.items():
        for method, m, value in found["rows"]:
            plan = Plan(method, m)
            # what is asked of one architecture costs the same whatever its weights are
            work_of = cost[name if name == "mlp" else "elastic", method, m]
            rows.append({"method": label(name, plan), "tokens": m, "accuracy": value, **work_of})
    order = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: (order.index(row["method"]), row["tokens"]))
    blind = floor()
    about = {
        "question_only": blind, "questions": len(easy_vqa()["test"]), "recipe": RECIPE,
        "steps": {name: found["steps"] for name, found in kept.items()}, "seed": kept["elastic"]["seed"],
        "timed_on": timed["machine"],
    }  # fmt: skip
    save("mqt_budget", rows, **about)

    plot_budget(rows, RESULTS / "mqt_budget.png", "one model at every number of visual tokens, easy-VQA", blind)
    print(table(rows))
    print(f"question alone: {blind:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "train", "accuracy", "latency", "report"), default="all")
    parser.add_argument("--work", type=Path, default=Path("runs/mqt_budget"))
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    steps = {
        "train": lambda: train(args.work), "accuracy": lambda: accuracy(args.work),
        "latency": lambda: latency(args.work, args.repeats), "report": lambda: report(args.work),
    }  # fmt: skip
    for name, step in steps.items():
        if args.part in ("all", name):
            step()


if __name__ == "__main__":
    main()
