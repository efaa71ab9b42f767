"""`zoo finetune`: a recipe that starts from the weights of an artifact or a published model."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser
from zoo.cli.train import add_run_options, run_one
from zoo.errors import ZooError, nearest


def parser() -> Parser:
    command = Parser(
        "finetune",
        "Train a recipe from the weights of REF; what the recipe's model leaves open is taken from REF.",
        [
            "zoo finetune hyenadna_uci_splice --from runs/hyenadna_chr20_pretrain/artifact",
            "zoo finetune hyenadna_uci_splice --from hyenadna-tiny-1k trainer.max_steps=300",
            "zoo finetune my.yaml --from user/model@v1 --out runs/mine --dry-run",
        ],
    )
    command.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a YAML file")
    command.add_argument("--from", dest="ref", metavar="REF", required=True,
                         help="artifact folder, model of the catalogue, or Hub id")  # fmt: skip
    add_run_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.compose import compose
    from zoo.train.recipe import validate

    check_ref(args.ref)
    return run_one(validate({**compose(args.recipe, args.overrides), "init": args.ref}), args)


def check_ref(ref: str) -> None:
    """Refuse, before torch is imported, a reference that can name nothing.

    Raises:
        ZooError: neither a folder, a Hub id nor a model of the catalogue.
    """
    from zoo import catalogue

    if ref in catalogue.ENTRIES or Path(ref).expanduser().exists():
        return
    if ref.count("/") == 1 and not ref.startswith((".", "/", "~")) and not Path(ref).parent.is_dir():
        return
    if "/" in ref:
        raise ZooError(f"artifact folder '{ref}' does not exist")
    raise ZooError(
        f"'{ref}' is neither a folder, a Hub id nor a model of the catalogue" + nearest(ref, catalogue.ENTRIES)
    )
