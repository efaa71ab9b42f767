"""`zoo bench budget`: accuracy, work and latency of a vision-language model against its number of visual tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser, write_rows
from zoo.errors import ZooError, nearest

RULES = ("hired", "globalcom2", "pool")  # as `zoo.models.mqt.REDUCERS`, which importing torch would cost


def parser() -> Parser:
    command = Parser(
        "bench",
        "budget: one row for each number of visual tokens: accuracy on a set of questions, FLOPs of the decoder's\n"
        "prefill and of the whole pass, and latency of one question and of one in a batch. --reduce adds rules that\n"
        "leave tokens out without having been trained to. Tab-separated on stdout, or in the file --out.",
        [
            "zoo bench budget runs/mqt_easy_vqa/artifact --data easy_vqa",
            "zoo bench budget runs/mqt_easy_vqa/artifact --data easy_vqa --tokens 2 16 --limit 500 --plot curve.png",
            "zoo bench budget runs/mqt_easy_vqa/artifact --data easy_vqa --reduce hired globalcom2 pool",
        ],
    )
    command.add_argument("what", metavar="WHAT", help="budget")
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_argument("--data", metavar="NAME", required=True, help="data set of the catalogue, or a YAML file")
    command.add_argument("--split", default="test", metavar="SPLIT", help="train, val or test (default: test)")
    command.add_argument("--root", metavar="DIR", help="folder that holds the files of --data")
    command.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[],
        metavar="M",
        help="visual tokens to measure (default: 1, 2, 4, 16 ...)",
    )
    command.add_argument("--reduce", nargs="+", default=[], metavar="RULE", help="hired, globalcom2 or pool")
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only N questions, spread evenly")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (default: 64)")
    command.add_argument("-o", "--out", metavar="FILE", help="write the table there rather than to stdout")
    command.add_argument("--plot", metavar="FILE", help="also draw the curve, a .png")
    return command


def run(args: argparse.Namespace) -> int:
    if args.what != "budget":
        raise ZooError(f"unknown benchmark '{args.what}'" + nearest(args.what, ["budget"]))
    unknown = next((rule for rule in args.reduce if rule not in RULES), None)
    if unknown is not None:
        raise ZooError(f"unknown rule '{unknown}' after --reduce" + nearest(unknown, RULES))
    if args.batch_size < 1 or args.limit < 0:
        raise ZooError("--batch-size must be at least 1 and --limit must not be negative")
    for name in (args.out, args.plot):
        if name is not None and not Path(name).expanduser().parent.is_dir():
            raise ZooError(f"folder '{Path(name).parent}' does not exist")
    if args.plot is not None and not args.plot.endswith(".png"):
        raise ZooError(f"'{args.plot}' must end in .png")
    from zoo.cli.evaluate import SPLITS, data_section

    if args.split not in SPLITS:
        raise ZooError(f"unknown split '{args.split}'" + nearest(args.split, SPLITS))
    changes = [f"batch_size={args.batch_size}", f"limit={args.limit}"] + ([f"root={args.root}"] if args.root else [])
    section = data_section(args.data, [])
    if section["name"] != "vqa":
        raise ZooError(f"data set '{args.data}' holds no questions about pictures")
    section = data_section(args.data, changes)
    from zoo import datamodules
    from zoo.cli.finetune import check_ref
    from zoo.hub import artifact
    from zoo.train.budget import budget_table, plot_budget

    check_ref(args.ref)
    found = artifact.load(args.ref)
    if found.tokenizer is None:
        raise ZooError(f"'{args.ref}' has no tokenizer for the questions")
    data = datamodules.build(section, found.tokenizer)
    rows = budget_table(found.model, data.loader(args.split, train=False), args.tokens, args.reduce)
    header = list(rows[0])
    show = lambda value: value if isinstance(value, str) else f"{value:.4g}"
    write_rows([[show(row[key]) for key in header] for row in rows], header, args.out)
    if args.plot is not None:
        plot_budget(rows, Path(args.plot).expanduser(), f"{args.ref} on {args.data}")
    return 0
