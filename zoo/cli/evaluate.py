"""`zoo eval`: measure an artifact on a data set of the catalogue, or on a user's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import evaluate_clips, evaluate_images
from zoo.cli.common import Parser, print_json, table
from zoo.errors import ConfigError, ZooError, nearest

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact

SPLITS = ("train", "val", "test")


def parser() -> Parser:
    command = Parser(
        "eval",
        "Measure an artifact on one split of a data set. Overrides change fields of the data set.",
        [
            "zoo eval runs/hyenadna_uci_splice/artifact --data uci_splice",
            "zoo eval runs/hyenadna_uci_splice/artifact --data uci_splice --split val --json",
            "zoo eval hyenadna-tiny-1k --data chr20 batch_size=4",
            "zoo eval user/model@v1 --data my_data.yaml",
            "zoo eval runs/flextok_emoji64/artifact --data emoji64 --tokens 4 --steps 1 --guidance 1",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_overrides()
    command.add_argument("--data", metavar="NAME", required=True, help="data set of the catalogue, or a YAML file")
    command.add_argument("--split", default="test", metavar="SPLIT", help="train, val or test (default: test)")
    command.add_argument("--json", action="store_true", help="for machines")
    evaluate_images.add_options(command)
    evaluate_clips.add_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.cli.finetune import check_ref

    check_ref(args.ref)
    if args.split not in SPLITS:
        raise ZooError(f"unknown split '{args.split}'" + nearest(args.split, SPLITS))
    section = data_section(args.data, args.overrides)
    from zoo.hub import artifact

    found = artifact.load(args.ref)
    if evaluate_clips.wanted(found):
        return evaluate_clips.run(found, section, args)
    if evaluate_images.wanted(found):
        return evaluate_images.run(found, section, args)
    metrics = evaluate(found, section, args.split)
    if args.json:
        print_json({"ref": args.ref, "data": section.get("id") or args.data, "split": args.split, "metrics": metrics})
        return 0
    print(f"{args.ref} on {args.split} of {section.get('id') or args.data}")
    print(table([(name, f"{value:.4f}") for name, value in metrics.items()], ("metric", "value"), right=(1,)))
    return 0


def data_section(name: str, overrides: list[str]) -> dict[str, Any]:
    """`{"name": ..., **fields}` of a data set with overrides, checked against its schema.

    Raises:
        ZooError: unknown data set, unknown field or wrong type.
    """
    import yaml

    from zoo import catalogue, datamodules
    from zoo.train.compose import assignments
    from zoo.train.recipe import check_section

    path = Path(name).expanduser()
    if path.suffix == ".yaml":
        if not path.is_file():
            raise ZooError(f"data file '{name}' does not exist")
        try:
            section = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ZooError(f"'{name}' is not valid YAML") from None
        if not isinstance(section, dict):
            raise ZooError(f"'{name}' must be a mapping of keys to values")
    else:
        section = datamodules.section(name)
    for keys, value in assignments(overrides):
        place = section
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{key}' of the data set is not a mapping")
        place[keys[-1]] = value
    return check_section("data", section, catalogue.DATAMODULES)


def evaluate(found: Artifact, section: dict[str, Any], split: str) -> dict[str, float]:
    """Metrics of an artifact on one split, named `split/metric`; raises what `zoo.train.evaluate` raises."""
    from zoo.train import evaluate as measure

    return {f"{split}/{name}": value for name, value in measure.evaluate(found, section, split).items()}
