"""`zoo recipes`: list, print and copy the recipes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from zoo._resources import folder
from zoo.cli.common import Parser, print_json, table
from zoo.errors import ZooError, nearest

ACTIONS = ("ls", "cat", "cp", "validate")


def parser() -> Parser:
    command = Parser(
        "recipes",
        "List the recipes (ls, with a text to look for), print one (cat), copy one to a file of your own to change it\n"
        "(cp), or check one or all of them (validate).",
        [
            "zoo recipes ls",
            "zoo recipes ls titok",
            "zoo recipes cat hyenadna_uci_splice",
            "zoo recipes cp hyenadna_uci_splice my.yaml",
            "zoo recipes validate",
        ],
    )
    command.add_argument("action", nargs="?", default="ls", metavar="ls|cat|cp|validate")
    command.add_argument("name", nargs="?", help="recipe; for ls a text that its name or description holds")
    command.add_argument("target", nargs="?", help="file or folder to copy to (default: the working directory)")
    command.add_argument("--json", action="store_true", help="for machines (ls)")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.compose import recipe_path

    if args.action not in ACTIONS:
        raise ZooError(f"zoo recipes does not know '{args.action}'" + nearest(args.action, ACTIONS))
    if args.action == "ls":
        return _list(args.name or "", args.json)
    if args.action == "validate":
        return _validate(args.name)
    if args.name is None:
        raise ZooError(f"zoo recipes {args.action} needs the name of a recipe; `zoo recipes ls` lists them")
    path = recipe_path(args.name)
    if args.action == "cat":
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    target = Path(args.target or ".").expanduser()
    target = target / path.name if target.is_dir() else target
    if target.exists():
        raise ZooError(f"'{target}' exists; copy to another name")
    if target.suffix != ".yaml":
        raise ZooError(f"'{target}' must end in .yaml to be a recipe")
    if not target.parent.is_dir():
        raise ZooError(f"folder '{target.parent}' does not exist")
    shutil.copyfile(path, target)
    print(f"{target}: change it, then `zoo validate {target}` and `zoo train {target}`")
    return 0


def _list(query: str, as_json: bool) -> int:
    everything = describe()
    rows = [row for row in everything if query.lower() in f"{row['name']} {row['description']}".lower()]
    if query and not rows:
        raise ZooError(f"no recipe matches '{query}'" + nearest(query, [row["name"] for row in everything]))
    if as_json:
        print_json(rows)
        return 0
    print(table([(row["name"], row["description"]) for row in rows], ("recipe", "what it trains")))
    return 0


def _validate(name: str | None) -> int:
    """Compose and check one recipe, or all of them; 1 when any is wrong, and each says what."""
    from zoo.train.compose import compose, recipe_names
    from zoo.train.recipe import validate

    if name is not None:
        validate(compose(name, []))
        print(f"{name}: valid")
        return 0
    wrong = 0
    names = recipe_names()
    for recipe in names:
        try:
            validate(compose(recipe, []))
        except ZooError as error:
            wrong += 1
            print(f"{recipe}: {error}")
    print(f"{len(names) - wrong} of {len(names)} recipes are valid")
    return 1 if wrong else 0


def describe() -> list[dict[str, str]]:
    """Name and description of every recipe; only top-level keys are read, nothing is composed."""
    import yaml

    from zoo.train.compose import recipe_names

    rows = []
    for name in recipe_names():
        content = yaml.safe_load((folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        rows.append({"name": name, "description": str(content.get("description", ""))})
    return rows
