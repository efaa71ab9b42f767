"""`zoo validate`: check a recipe whole, without importing torch."""

from __future__ import annotations

import argparse

from zoo.cli.common import Parser, print_json


def parser() -> Parser:
    command = Parser(
        "validate",
        "Check a recipe and overrides: names, keys, types. Prints nothing but a line when all is well.",
        [
            "zoo validate hyenadna_uci_splice",
            "zoo validate hyenadna_uci_splice data=chr20_splice trainer.max_steps=100",
            "zoo validate my.yaml --show",
        ],
    )
    command.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a YAML file")
    command.add_overrides()
    command.add_argument("--show", action="store_true", help="print the resolved recipe, all defaults filled in")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    return command


def run(args: argparse.Namespace) -> int:
    import yaml

    from zoo.config import to_dict
    from zoo.train.compose import compose
    from zoo.train.recipe import validate

    recipe = validate(compose(args.recipe, args.overrides))
    if args.json:
        print_json(to_dict(recipe))
    elif args.show:
        print(yaml.safe_dump(to_dict(recipe), sort_keys=False), end="")
    else:
        print(f"{args.recipe}: valid ({recipe.task['name']} of {recipe.model['name']} on {recipe.data['name']} data)")
    return 0
