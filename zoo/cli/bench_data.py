"""`zoo bench-data`: recipes on the data sets of a benchmark suite, beside their floors and the published numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser, table
from zoo.errors import ZooError


def parser() -> Parser:
    command = Parser(
        "bench-data",
        "Train recipes on every set of a benchmark suite (embedded, gue, genomic_benchmarks, nucleotide_transformer) "
        "with several seeds and the suite's own metric. Results go to DIR/SUITE.csv, one row for each (model, set, "
        "seed), and the table to DIR/SUITE.md; rows that are there are not run again.",
        [
            "zoo bench-data embedded --sets uci_splice --seeds 0",
            "zoo bench-data gue --root ~/GUE --models hyenadna,dnabert2_small,lr,cnn --out results",
            "zoo bench-data gue --root ~/GUE --sets mouse_2 --models hyenadna_prom_core_tata trainer.max_epochs=5",
            "zoo bench-data genomic_benchmarks --sets human_enhancers_cohn --models my.yaml --init user/model@v1",
            "zoo bench-data embedded --out benchmarks/results/bench_data --table",
        ],
    )
    command.add_argument("group", metavar="SUITE", help="benchmark suite; `nt` and `gb` are short for the long names")
    command.add_overrides()
    command.add_argument("--sets", default="", metavar="A,B", help="sets of the suite (default: all)")
    command.add_argument("--models", default="", metavar="A,B",
                         help="recipes, starts of recipes' names (hyenadna: hyenadna_<set>), lr, cnn "
                              "(default: every start that has recipes for the sets, and both floors)")  # fmt: skip
    command.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds of each model on each set")
    command.add_argument("--root", metavar="DIR", help="folder of the suite's files, in the layout it is published in")
    command.add_argument("--init", metavar="REF", help="artifact, catalogue model or Hub id every recipe starts from")
    command.add_argument("-o", "--out", default="runs/bench_data", metavar="DIR", help="folder of the results")
    command.add_argument("--keep", metavar="DIR", help="keep runs and artifacts there (default: only the numbers)")
    command.add_argument("--no-floors", action="store_true", help="run neither regression nor small network")
    command.add_argument("--table", action="store_true", help="run nothing: show what the results hold")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.bench_suites import choose_sets, load_suite

    suite = load_suite(args.group)
    sets = choose_sets(suite, split(args.sets))
    seeds = whole_numbers(args.seeds)
    out = Path(args.out).expanduser()
    root = Path(args.root).expanduser() if args.root else None
    if root is not None and not root.is_dir():
        raise ZooError(f"folder '{args.root}' does not exist; --root is the folder that holds the sets of {suite.name}")
    if args.init:
        from zoo.cli.finetune import check_ref

        check_ref(args.init)
    from zoo.train import bench

    models = split(args.models) or bench.default_models(sets)
    floors = [] if args.no_floors else [name for name in bench.BASELINES if name not in models]
    keep = Path(args.keep).expanduser() if args.keep else None
    plan = bench.Plan(
        suite, sets, [*floors, *models], seeds, out, root, args.init, tuple(args.overrides), keep
    )  # fmt: skip
    if args.table:
        rows = bench.read_results(plan.results)
        if not rows:
            raise ZooError(f"'{plan.results}' holds no results yet; run without --table")
    else:
        rows = bench.run(plan, lambda line: print(line, flush=True))
    from zoo.train.bench_report import markdown, table_rows

    header, lines = table_rows(suite, rows)
    print(table(lines, header))
    plan.results.with_suffix(".md").write_text(markdown(suite, rows), encoding="utf-8")
    print(f"results: {plan.results} and {plan.results.with_suffix('.md').name}")
    return 0


def split(text: str) -> list[str]:
    """`a,b` as a list without empty items and doubles."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def whole_numbers(text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises:
        ZooError: none, or one that is not a whole number from 0 up.
    """
    items = split(text)
    if not items or not all(item.isascii() and item.isdigit() for item in items):
        raise ZooError(f"--seeds takes whole numbers from 0 up, as in 0,1,2, not '{text}'")
    return [int(item) for item in items]
