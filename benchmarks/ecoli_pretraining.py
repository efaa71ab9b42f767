"""Does a language model of E. coli learn more than short words, and does it help?

Bits per base on the held-out last tenth of the genome beside Markov models of every order, counted on the same first
80 % (both strands), and classifiers fine-tuned from the language model beside the same ones from scratch: another
bacterium's genes, from all labelled rows and from a few, and promoters of E. coli.

    python benchmarks/ecoli_pretraining.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS
from numpy.typing import NDArray

from zoo.datamodules import section
from zoo.datamodules.fasta import read_fasta
from zoo.datamodules.manifest import locate

PRETRAIN = "hyenadna_ecoli_pretrain_256"
ORDERS = 9
PRIOR = 20.0  # pseudo-counts of the next shorter context
FEW = 200  # labelled rows of the setting with few of them; each seed draws its own, the same for both starts
RATES = ("1e-3", "2e-3", "4e-3", "1e-2")  # both starts are tuned over these on the dev split
# whether a run starts from the language model, and what it trains: all weights, or the head alone on frozen states
STARTS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "scratch": (False, ()), "pretrained": (True, ()), "probe": (True, ("+finetune.mode=probe",)),
}  # fmt: skip


def genome() -> NDArray[np.int64]:
    """Bases of E. coli as 0 to 3."""
    data = section("ecoli")
    (record,) = read_fasta(locate(data["files"][0]["path"]))
    codes = np.full(256, -1, np.int64)
    codes[list(b"ACGT")] = range(4)
    bases = codes[np.frombuffer(record[1].upper(), np.uint8)]
    assert (bases >= 0).all(), "the genome holds nothing but A, C, G and T"
    return bases


def words(bases: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """All words of *length* bases as numbers, the first base the highest digit."""
    found = np.zeros(len(bases) - length + 1, np.int64)
    for i in range(length):
        found = found * 4 + bases[i : len(found) + i]
    return found


def markov(train: NDArray[np.int64], test: NDArray[np.int64], both: bool) -> list[float]:
    """Bits per base on *test* of interpolated Markov models of order 0, 1, ... counted on *train* (on both strands).

    p_k(x | c) = (n(c x) + PRIOR p_{k-1}(x | c without its first base)) / (n(c) + PRIOR), p_{-1} uniform.
    """
    strands = [train, 3 - train[::-1]] if both else [train]
    shorter, bits = np.full((1, 4), 0.25), []
    for order in range(ORDERS):
        counts = sum(np.bincount(words(s, order + 1), minlength=4 ** (order + 1)) for s in strands).reshape(-1, 4)
        prior = shorter if order == 0 else np.tile(shorter, (4, 1))
        shorter = (counts + PRIOR * prior) / (counts.sum(1, keepdims=True) + PRIOR)
        bits.append(float(-np.log2(shorter.ravel()[words(test, order + 1)]).mean()))
    return bits


def floors() -> dict[str, Any]:
    """Markov models of the split that the recipe's data names."""
    bases, split = genome(), section("ecoli")["split"]
    cut = {name: [round(edge * len(bases)) for edge in split[name]] for name in ("train", "test")}
    train, test = bases[slice(*cut["train"])], bases[slice(*cut["test"])]
    return {"train": cut["train"], "test": cut["test"],
            "one_strand": markov(train, test, False), "both_strands": markov(train, test, True)}  # fmt: skip


def pretrain(place: Path) -> dict[str, Any]:
    """The run of the language model: from *place* if it is finished there, else trained."""
    from zoo.train.compose import compose
    from zoo.train.recipe import validate
    from zoo.train.run import train

    record = place / "artifact" / "run.json"
    if not record.is_file():
        train(validate(compose(PRETRAIN)), place, resume=(place / "checkpoints").is_dir())
    run: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return run


def finetune(start: Path, out: Path, seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """Scores of both classifiers from scratch and from *start*, one a seed; rows in *out* are not trained again.

    The promoters are too few for a test split of their own: a seed's score is the mean accuracy over five folds.
    """
    from zoo.train import bench
    from zoo.train.bench_suites import BenchSet, Suite

    suite = Suite("ecoli_pretraining", "", "catalogue", {})  # its name is that of the results file
    folds = [(BenchSet(f"ecoli_promoters106 fold {k}", "", 57, 2, "accuracy"), {"fold": k}) for k in range(5)]
    tasks = {
        "ecoli_promoters106": ("hyenadna_ecoli_promoters_256", folds),
        "coding_leptospira": (
            "hyenadna_coding_leptospira_256",
            [(BenchSet("coding_leptospira", "", 200, 2, "mcc"), {})],
        ),
    }
    scores: dict[str, dict[str, list[float]]] = {}
    for name, (recipe, parts) in tasks.items():
        for how, init in (("scratch", None), ("pretrained", str(start))):
            plan = bench.Plan(suite, [item for item, _ in parts], [recipe], seeds, out, init=init)
            for seed in seeds:
                found = [row_of(bench, plan, item, recipe, seed, section(name, **change)) for item, change in parts]
                score = 100 * statistics.fmean(float(row["score"]) for row in found)
                scores.setdefault(name, {}).setdefault(how, []).append(score)
                print(f"{name} {how} seed {seed}: {score:.1f}", flush=True)
    return scores


def few_rows(start: Path, out: Path, seeds: list[int]) -> dict[str, Any]:
    """Genes of Leptospira from FEW training rows: each start at every rate, the rate chosen by the mean dev MCC.

    All weights are trained, from scratch and from the language model, and of the latter the head alone too. All average
    over the two strands when they are measured.

    The dev split (500 rows) chooses the rate and the epoch, of both starts alike; the test split chooses nothing.
    """
    from zoo.train import bench
    from zoo.train.bench_suites import BenchSet, Suite

    suite, recipe = Suite("ecoli_pretraining", "", "catalogue", {}), "hyenadna_coding_leptospira_256"
    found: dict[str, Any] = {"rows": FEW, "rates": list(RATES), "dev": {}, "chosen": {}, "test": {}}
    fixed = (f"data.limit={FEW}", "data.batch_size=16", "trainer.max_epochs=-1", "trainer.max_steps=300",
             "trainer.val_every=50", "task.rc=average", "data.rc_views=true")  # fmt: skip
    for how, (loaded, more) in STARTS.items():
        scores = {}
        for rate in RATES:
            kind = ", probe" if more else ""
            item = BenchSet(f"coding_leptospira {FEW} rows, both strands, lr {rate}{kind}", "", 200, 2, "mcc")
            plan = bench.Plan(
                suite, [item], [recipe], seeds, out, init=str(start) if loaded else None,
                overrides=(*fixed, *more, f"task.optim.lr={rate}"),
            )  # fmt: skip
            scores[rate] = [row_of(bench, plan, item, recipe, seed, section("coding_leptospira")) for seed in seeds]
        dev = {rate: [100 * float(row["val_score"]) for row in rows] for rate, rows in scores.items()}
        best = max(RATES, key=lambda rate: statistics.fmean(dev[rate]))
        found["dev"][how], found["chosen"][how] = dev, best
        found["test"][how] = [100 * float(row["score"]) for row in scores[best]]
        print(f"{FEW} rows {how}: lr {best}, dev {statistics.fmean(dev[best]):.1f}, "
              f"test {statistics.fmean(found['test'][how]):.1f}", flush=True)  # fmt: skip
    return found


def row_of(bench: Any, plan: Any, item: Any, recipe: str, seed: int, data: dict[str, Any]) -> dict[str, str]:
    """The row of one run, from the results or made now."""
    wanted = (item.name, bench.label(plan, recipe), str(seed))
    for row in bench.read_results(plan.results):
        if bench.key(row) == wanted:
            return dict(row)
    row = bench.run_one(plan, item, recipe, seed, data)
    bench.append(plan.results, row)
    return dict(row)


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--run", type=Path, default=Path("runs") / PRETRAIN, help="folder of the pretraining run")
    command.add_argument("--out", type=Path, default=RESULTS / "bench_data", help="folder of the results")
    command.add_argument("--seeds", default="0,1,2")
    args = command.parse_args()
    began = time.monotonic()
    markov_bits = floors()
    best = min(markov_bits["both_strands"])
    print(f"Markov order 5: {markov_bits['both_strands'][5]:.4f} bits per base, best order {best:.4f}", flush=True)
    run = pretrain(args.run)
    bits = run["metrics"]["test/bits_per_base"]
    print(f"{PRETRAIN}: {bits:.4f} bits per base on the same bases", flush=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    few = few_rows(args.run / "artifact", args.out, seeds)
    scores = finetune(args.run / "artifact", args.out, seeds)
    result = {
        "markov": markov_bits,
        "model": {
            "recipe": PRETRAIN,
            "bits_per_base": bits,
            "parameters": run["parameters"],
            "steps": run["steps"],
            "train_seconds": run["timing"]["train_seconds"],
            "hardware": run["hardware"],
            "versions": run["versions"],
        },
        "finetuning": scores,
        "few_rows": few,
        "seconds": round(time.monotonic() - began, 1),
    }
    target = args.out / "ecoli_pretraining.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
