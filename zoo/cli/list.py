"""`zoo list`: the models of the catalogue."""

from __future__ import annotations

import argparse
from typing import Any

from zoo import catalogue
from zoo.cli.common import Parser, print_json, short, table
from zoo.errors import ZooError, nearest
from zoo.hub.cache import on_disk


def parser() -> Parser:
    command = Parser(
        "list",
        "Models of the catalogue. QUERY keeps those whose name, family, Hub id or task holds it.",
        ["zoo list", "zoo list hyenadna", "zoo list causal_lm --json"],
    )
    command.add_argument("query", nargs="?", default="", metavar="QUERY", help="text to look for")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    rows = [row(name) for name in catalogue.list_models(args.query)]
    if args.query and not rows:
        known = [*catalogue.ENTRIES, *(entry.model for entry in catalogue.ENTRIES.values())]
        raise ZooError(f"no model matches '{args.query}'" + nearest(args.query, known))
    if args.json:
        print_json(rows)
        return 0
    header = ("name", "family", "params", "context", "vocab", "licence", "tasks", "on disk")
    shown = [
        (r["name"], r["family"], short(r["params"]), f"{r['context']:,}" if r["context"] else "any", r["vocab"],
         r["licence"], ", ".join(r["tasks"]), "yes" if r["on_disk"] else "no")
        for r in rows
    ]  # fmt: skip
    print(table(shown, header, right=(2, 3, 4)))
    print(f"\n{len(rows)} published models; `zoo info NAME` tells more, `zoo recipes ls` shows what can be trained")
    return 0


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
        "on_disk": on_disk(entry.hub),
    }
