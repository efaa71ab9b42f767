"""Data: FASTA genomes and labelled sequences, sha256-checked, in a seeded order that resumes where it stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo import catalogue
from zoo.config import from_dict, resolve, schema
from zoo.errors import ConfigError, ZooError, nearest

if TYPE_CHECKING:
    from zoo.datamodules.base import Data
    from zoo.tokenizers.base import Tokenizer


def build(section: dict[str, Any], tokenizer: Tokenizer | None, seed: int = 0) -> Data:
    """The datamodule of `{"name": ..., **fields}`.

    Raises:
        ConfigError: no or unknown name, unknown or ill-typed field.
    """
    if "name" not in section:
        raise ConfigError(f"data needs a 'name' (one of: {', '.join(sorted(catalogue.DATAMODULES))})")
    target = catalogue.lookup(catalogue.DATAMODULES, section["name"], "data name")
    fields = {key: value for key, value in section.items() if key != "name"}
    config: Any = from_dict(schema(catalogue.schema_target(target)), fields, "data")
    return resolve(target)(config, tokenizer, seed)


def names() -> list[str]:
    """The data sets of the catalogue's `datamodules/`."""
    from zoo._resources import folder

    return sorted(path.stem for path in folder("datamodules").glob("*.yaml"))


def section(name: str, **changes: Any) -> dict[str, Any]:
    """`{"name": ..., **fields}` of the catalogue's data set *name*, with some fields changed.

    Raises:
        ZooError: no such data set, with the nearest one.
    """
    import yaml

    from zoo._resources import folder

    path = folder("datamodules") / f"{name}.yaml"
    if not path.is_file():
        raise ZooError(f"no data set '{name}' in the catalogue" + nearest(name, names()))
    return {**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}
