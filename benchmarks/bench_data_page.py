"""Write docs/benchmarks.md from the results of `zoo bench-data` and of ecoli_pretraining.py.

python benchmarks/bench_data_page.py            # --check: is the page the one the results give?
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from zoo.train.bench import read_results
from zoo.train.bench_report import markdown
from zoo.train.bench_suites import load_suite, suite_names

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_data"
PAGE = HERE.parent / "docs" / "benchmarks.md"
INTRO = """# Benchmarks on data

Small models trained from scratch on one CPU thread, beside the floors that every table carries: a logistic regression
on k-mers or single bases and a network of three convolutions. The page is written by `benchmarks/bench_data_page.py`
from the files in `benchmarks/results/bench_data/`; each of their rows is one training run, and the recipe of its name
holds every setting. To make the numbers again:

```text
zoo bench-data embedded --sets chr20_splice,uci_splice,species5 --out benchmarks/results/bench_data
zoo bench-data gue --root GUE --sets prom_core_tata --out benchmarks/results/bench_data
python benchmarks/ecoli_pretraining.py
python benchmarks/bench_data_page.py
```

`zoo bench-data` runs any recipe, or one of your own, on any set of a suite (embedded, gue, genomic_benchmarks,
nucleotide_transformer) with the suite's metric; `--init` starts every recipe from an artifact. A run that is
interrupted continues with the first row that is missing.
"""


def suites() -> list[str]:
    """One section for each suite that has results."""
    parts = []
    for name in suite_names():
        rows = read_results(RESULTS / f"{name}.csv")
        if rows:
            parts.append(f"## {name}\n\n{markdown(load_suite(name), rows)}")
    return parts


def pretraining() -> list[str]:
    """The section about the language model of E. coli."""
    path = RESULTS / "ecoli_pretraining.json"
    if not path.is_file():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model, floor, tuned = found["model"], found["markov"], found["finetuning"]
    lines = [
        "## Pretraining on E. coli",
        "",
        "Bits per base on the last tenth of the genome of E. coli K-12. The Markov models are interpolated over orders "
        "and counted on the same first 80 %, on both strands.",
        "",
        "| model | bits per base |",
        "|---|---|",
        *(f"| Markov, order {order} | {floor['both_strands'][order]:.4f} |" for order in range(3, 9)),
        f"| {model['recipe']}, {model['parameters']:,} parameters, {model['train_seconds'] / 60:.0f} minutes | "
        f"{model['bits_per_base']:.4f} |",
        "",
        "Test MCC × 100 on coding_leptospira, accuracy in % over five folds of ecoli_promoters106; the same recipe "
        "from scratch and from the language model, mean ± standard deviation over seeds.",
        "",
        "| set | start | mean ± sd | each seed |",
        "|---|---|---|---|",
    ]
    titles = {"scratch": "from scratch", "pretrained": "from the language model"}
    for name, starts in tuned.items():
        for start, scores in starts.items():
            each = ", ".join(f"{score:.1f}" for score in scores)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            lines.append(f"| {name} | {titles[start]} | {statistics.fmean(scores):.1f} ± {spread:.1f} | {each} |")
    if "few_rows" in found:
        lines += few_rows(found["few_rows"])
    return ["\n".join(lines) + "\n"]


def few_rows(found: dict[str, Any]) -> list[str]:
    """The setting with few labelled rows: the choice of the rate on dev, and test at the chosen rate."""
    titles = {
        "scratch": "from scratch, all weights",
        "pretrained": "from the language model, all weights",
        "probe": "from the language model, linear probe",
    }
    lines = [
        "",
        f"With few labels: coding_leptospira from {found['rows']} of its 3,500 training rows (each seed draws its own, "
        "the same for every start; 300 steps of 16; averaged over both strands). A linear probe trains the head alone, "
        "on frozen states. All were tuned over the same learning rates, chosen by the mean MCC × 100 on the 500 rows "
        "of dev, which also choose the step; test is read at the chosen rate alone.",
        "",
        "| start | " + " | ".join(f"dev, lr {rate}" for rate in found["rates"]) + " | test | each seed |",
        "|---|" + "---|" * (len(found["rates"]) + 2),
    ]
    for start, dev in found["dev"].items():
        cells = [f"{statistics.fmean(dev[rate]):.1f}" for rate in found["rates"]]
        cells = [f"**{c}**" if r == found["chosen"][start] else c for c, r in zip(cells, found["rates"], strict=True)]
        test = found["test"][start]
        spread = statistics.stdev(test) if len(test) > 1 else 0.0
        each = ", ".join(f"{score:.1f}" for score in test)
        middle = " | ".join(cells)
        lines.append(f"| {titles[start]} | {middle} | {statistics.fmean(test):.1f} ± {spread:.1f} | {each} |")
    return lines


def page() -> str:
    """The whole page; `notes.md` beside the results is appended as it stands."""
    notes = RESULTS / "notes.md"
    extra = [notes.read_text(encoding="utf-8")] if notes.is_file() else []
    return "\n".join([INTRO, *suites(), *pretraining(), *extra])


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    text = page()
    if command.parse_args().check:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text else 1)
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
