"""`zoo search`: what others published with this library."""

from __future__ import annotations

import argparse

from zoo.cli.common import Parser, print_json, table


def parser() -> Parser:
    command = Parser(
        "search",
        "Artifacts on the Hub that were published by this library and whose id holds QUERY.",
        ["zoo search", "zoo search splice", "zoo search hyenadna --json"],
    )
    command.add_argument("query", nargs="?", default="", metavar="QUERY")
    command.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many (default: 50)")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    return show(args.query, args.limit, args.json)


def show(query: str, limit: int, as_json: bool) -> int:
    """Print what the Hub has.

    Raises:
        ZooError: the Hub does not answer.
    """
    from zoo.hub import client
    from zoo.hub.cache import on_disk

    rows = [{**row, "on_disk": on_disk(row["id"])} for row in client.search(query, limit=limit)]
    if as_json:
        print_json(rows)
        return 0
    if rows:
        cells = [
            (
                r["id"],
                r["licence"],
                r["downloads"],
                r["updated"],
                "yes" if r["on_disk"] else "no",
                ", ".join(r["tags"][:4]),
            )
            for r in rows
        ]
        print(table(cells, ("id", "licence", "downloads", "updated", "on disk", "tags"), right=(2,)))
        print()
    found = f"{len(rows)} artifacts on the Hub" + (f" match '{query}'" if query else "")
    print(f"{found}; `zoo pull ID` fetches one, `zoo list` shows the official weights")
    return 0
