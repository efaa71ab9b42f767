"""`zoo list`: the models of the catalogue."""

from __future__ import annotations

import argparse
import re
from typing import Any

from zoo import catalogue
from zoo.cli.common import Parser, print_json, short, table
from zoo.errors import ZooError, nearest
from zoo.hub.cache import on_disk


def parser() -> Parser:
    command = Parser(
        "list",
        "Models of the catalogue. QUERY keeps those whose name, family, Hub id, licence or task holds it.",
        [
            "zoo list hyenadna",
            "zoo list --task causal_lm --params 1M-100M",
            "zoo list --licence apache-2.0 --json",
            "zoo list --on-disk",
            "zoo list splice --remote",
        ],
    )
    command.add_argument("query", nargs="?", default="", metavar="QUERY", help="text to look for")
    command.add_argument("--task", metavar="NAME", help="only models for this task")
    command.add_argument("--params", metavar="LOW-HIGH", help="only of so many parameters, as in 1M-100M, -1B or 500k-")
    command.add_argument("--licence", "--license", metavar="NAME", help="only with this licence")
    command.add_argument("--on-disk", action="store_true", help="only those in the Hub cache of this machine")
    command.add_argument("--remote", action="store_true", help="artifacts on the Hub in place of the catalogue")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    if args.remote:
        from zoo.cli.search import show

        if args.task or args.params or args.licence or args.on_disk:
            raise ZooError("--remote takes a text to look for and no filters")
        return show(args.query, 50, args.json)
    rows = [row(name) for name in catalogue.list_models(args.query)]
    if args.query and not rows:
        known = [*catalogue.ENTRIES, *(entry.model for entry in catalogue.ENTRIES.values())]
        raise ZooError(f"no model matches '{args.query}'" + nearest(args.query, known))
    rows = [kept for kept in rows if _wanted(kept, args)]
    if args.json:
        print_json(rows)
        return 0
    header = ("name", "family", "params", "context", "vocab", "licence", "tasks", "verified", "on disk")
    shown = [
        (r["name"], r["family"], short(r["params"]), f"{r['context']:,}" if r["context"] else "any",
         r["vocab"] or "none", r["licence"], ", ".join(r["tasks"]), r["verified"], "yes" if r["on_disk"] else "no")
        for r in rows
    ]  # fmt: skip
    print(table(shown, header, right=(2, 3, 4)))
    print(f"\n{len(rows)} published models; `zoo info NAME` tells more, `zoo recipes ls` shows what can be trained")
    return 0


def _wanted(found: dict[str, Any], args: argparse.Namespace) -> bool:
    low, high = limits(args.params)
    _check("--task", args.task, {task for entry in catalogue.ENTRIES.values() for task in entry.tasks})
    _check("--licence", args.licence, {entry.licence for entry in catalogue.ENTRIES.values()})
    return (
        args.task in (None, *found["tasks"])
        and args.licence in (None, found["licence"])
        and low <= found["params"] <= high
        and (found["on_disk"] or not args.on_disk)
    )


def _check(flag: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        raise ZooError(f"no model has {flag} '{value}'" + nearest(value, known))


def limits(text: str | None) -> tuple[float, float]:
    """`1M-100M` -> (1e6, 1e8); either end may be left out, and one number alone means at most that many.

    Raises:
        ZooError: not of that form.
    """
    if text is None:
        return 0.0, float("inf")
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)([kKmMbBgG]?))?(-)?(?:(\d+(?:\.\d+)?)([kKmMbBgG]?))?", text)
    if not match or not (match[1] or match[4]) or (match[1] and match[4] and not match[3]):
        raise ZooError(f"--params '{text}' should read as in 1M-100M, -1B or 500k-")
    size = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
    low = float(match[1]) * size[match[2].lower()] if match[1] else 0.0
    high = float(match[4]) * size[match[5].lower()] if match[4] else float("inf")
    return (low, high) if match[3] else (0.0, low)


def row(name: str) -> dict[str, Any]:
    """What is known of one entry, for the table and for --json."""
    entry = catalogue.ENTRIES[name]
    return {
        "name": name,
        "family": entry.model,
        "hub": entry.hub,
        "params": entry.params,
        "context": entry.context,
        "vocab": entry.vocab,
        "tokenizer": entry.tokenizer,
        "licence": entry.licence,
        "tasks": list(entry.tasks),
        "verified": verified(entry.model),
        "on_disk": on_disk(entry.hub),
    }


def verified(family: str) -> str:
    """What parity cases prove of a family: `outputs` (equal to the official code's), else `names` of its weights."""
    module = catalogue.CONVERTERS.get(family, "")
    replayed = family in catalogue.REPLAYS or any(to.partition(":")[0] == module for to in catalogue.REPLAYS.values())
    return "outputs" if replayed else "names"
