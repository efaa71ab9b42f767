"""`zoo info`: everything about one thing of the catalogue, or about an artifact."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from zoo import catalogue
from zoo._resources import folder
from zoo.cli.common import Parser, print_json, table
from zoo.cli.list import verified
from zoo.config import schema, to_dict
from zoo.errors import ZooError, nearest
from zoo.hub.cache import on_disk
from zoo.hub.names import looks_like_ref, parse_ref

TABLES = {"family": catalogue.MODELS, "mixer": catalogue.MIXERS, "task": catalogue.TASKS,
          "tokenizer class": catalogue.TOKENIZERS, "data class": catalogue.DATAMODULES}  # fmt: skip


def parser() -> Parser:
    command = Parser(
        "info",
        "Everything about NAME: a published model, a family, a mixer, a task, a recipe, a data set, a tokenizer, or\n"
        "an artifact (a folder, or the Hub id of one in the cache). For families, mixers and tasks: every config\n"
        "field with what it means.",
        [
            "zoo info hyenadna-tiny-1k",
            "zoo info hyenadna",
            "zoo info uci_splice",
            "zoo info classify --json",
            "zoo info LongSafari/hyenadna-small-32k-seqlen-hf",
        ],
    )
    command.add_argument("name", metavar="NAME")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    import yaml

    found = find(args.name)
    if args.json:
        print_json(found)
        return 0
    print(f"{args.name}: {found.pop('kind')}\n")
    text = found.pop("text", "")
    if text:
        print(text.strip() + "\n")
    flat = {key: value for key, value in found.items() if not _long(value)}
    if flat:
        print(table([(key, _flat(value)) for key, value in flat.items()], ("field", "value")))
    for key, value in found.items():
        if _long(value):
            print(
                f"\n{key}\n{textwrap.indent(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip(), '  ')}"
            )
    return 0


def find(name: str) -> dict[str, Any]:
    """What is known of *name*; `kind` says what it is.

    Raises:
        ZooError: nothing has that name, with the nearest one.
    """
    from zoo.train.compose import recipe_names, recipe_path

    if (Path(name) / "config.json").is_file():
        described = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        return {"kind": "artifact folder", **described}
    if name in catalogue.ENTRIES:
        return {"kind": "published model", **_entry(name)}
    if looks_like_ref(name):
        return _hub(name)
    for kind, known in TABLES.items():
        if name in known:
            cls = schema(catalogue.schema_target(known[name]))
            return {"kind": kind, "text": inspect.cleandoc(cls.__doc__ or ""), **_defaults(cls)}
    if name in recipe_names():
        return {"kind": "recipe", "text": recipe_path(name).read_text(encoding="utf-8")}
    data, tokenizer = folder("datamodules") / f"{name}.yaml", folder("tokenizers") / name / "tokenizer.yaml"
    for kind, path in (("data set", data), ("tokenizer", tokenizer)):
        if path.is_file():
            import yaml

            return {"kind": kind, **yaml.safe_load(path.read_text(encoding="utf-8"))}
    raise ZooError(f"nothing is called '{name}'" + nearest(name, _names()))


def _hub(name: str) -> dict[str, Any]:
    """A repository of the Hub, as far as this machine knows it; nothing is fetched."""
    from zoo.hub.cache import cached_snapshot

    ref = parse_ref(name)
    known = [
        entry for entry in catalogue.ENTRIES if catalogue.ENTRIES[entry].hub in (ref.repo, ref.repo.removesuffix("-hf"))
    ]
    snapshot = cached_snapshot(ref.repo, ref.revision)
    if snapshot is not None and (snapshot / "files.json").is_file():
        described = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
        return {"kind": f"artifact in the Hub cache (commit {snapshot.name[:12]})", **described}
    if len(known) == 1:
        return {"kind": f"official repository of {known[0]}", **_entry(known[0])}
    if known:
        raise ZooError(f"'{ref.repo}' holds several models: name one of {', '.join(known)}")
    raise ZooError(f"'{name}' is not in the Hub cache of this machine: `zoo pull {name}` fetches it")


def _names() -> list[str]:
    from zoo.train.compose import recipe_names

    data = [path.stem for path in folder("datamodules").glob("*.yaml")]
    words = [path.parent.name for path in folder("tokenizers").glob("*/tokenizer.yaml")]
    return [*catalogue.ENTRIES, *(key for known in TABLES.values() for key in known), *recipe_names(), *data, *words]


def _entry(name: str) -> dict[str, Any]:
    entry = catalogue.ENTRIES[name]
    facts = to_dict(entry)
    family = catalogue.MODELS[entry.model]
    config = {**_defaults(schema(catalogue.schema_target(family))), **entry.config}
    return {**facts, "verified": verified(entry.model), "on disk": on_disk(entry.hub), "config": config}


def _defaults(cls: type) -> dict[str, Any]:
    """Default of each field; `required` where there is none."""
    import dataclasses

    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            found[item.name] = to_dict(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            found[item.name] = to_dict(item.default_factory())
        else:
            found[item.name] = "required"
    return found


def _long(value: Any) -> bool:
    """Nested values are shown as indented YAML below the table."""
    return isinstance(value, dict | list) and len(json.dumps(value)) > 60


def _flat(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
