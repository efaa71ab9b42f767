"""Does a language model of E. coli learn more than short words, and does it help to tell coding from intergenic DNA?

Bits per base on the held-out last tenth of the genome beside Markov models of every order, counted on the same first
80 % (both strands), and a classifier of another bacterium's genes fine-tuned from the language model beside the same
one from scratch.

    python benchmarks/ecoli_pretraining.py
"""

from __future__ import annotations

import argparse
import dataclasses
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

PRETRAIN, FINETUNE, SET = "hyenadna_ecoli_pretrain_256", "hyenadna_coding_leptospira_256", "coding_leptospira"
ORDERS = 9
PRIOR = 20.0  # pseudo-counts of the next shorter context


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


def finetune(start: Path, out: Path, seeds: list[int]) -> dict[str, list[dict[str, str]]]:
    """Result rows of the classifier from scratch and from *start*; those in *out* are not trained again."""
    from zoo.train import bench
    from zoo.train.bench_suites import load_suite

    suite = load_suite("embedded")
    suite = dataclasses.replace(suite, name="ecoli_pretraining")  # the name of the results file
    plan = bench.Plan(suite, [suite.sets[SET]], [FINETUNE], seeds, out)
    found = {}
    for name, init in (("scratch", None), ("pretrained", str(start))):
        part = dataclasses.replace(plan, init=init)
        rows = bench.run(part, lambda line: print(line, flush=True))
        found[name] = [row for row in rows if row["model"] == bench.label(part, FINETUNE)]
    return found


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
    rows = finetune(args.run / "artifact", args.out, [int(seed) for seed in args.seeds.split(",")])
    scores = {name: [100 * float(row["mcc"]) for row in found] for name, found in rows.items()}
    for name, values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{SET} {name}: MCC {statistics.fmean(values):.1f} ± {spread:.1f}")
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
        "finetuning": {"recipe": FINETUNE, "set": SET, "metric": "mcc", **scores},
        "seconds": round(time.monotonic() - began, 1),
    }
    target = args.out / "ecoli_pretraining.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
