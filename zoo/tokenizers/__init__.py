"""Text (DNA) to token ids and back: character, k-mer and BPE tokenizers, all with offsets and vectorised batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalogue
from zoo.config import from_dict, resolve, schema
from zoo.errors import ConfigError, ZooError, nearest

if TYPE_CHECKING:
    from zoo.tokenizers.base import Tokenizer


def build(section: dict[str, Any], base: Path | None = None) -> Tokenizer:
    """The tokenizer of `{"name": ..., **fields}`; files it names are relative to the folder *base* (or the cwd).

    Raises:
        ConfigError: no or unknown name, unknown or ill-typed field.
        ZooError: a file it needs is missing.
    """
    if "name" not in section:
        raise ConfigError(f"tokenizer needs a 'name' (one of: {', '.join(sorted(catalogue.TOKENIZERS))})")
    target = catalogue.lookup(catalogue.TOKENIZERS, section["name"], "tokenizer name")
    fields = {key: value for key, value in section.items() if key != "name"}
    cls = resolve(target)
    return cls(from_dict(schema(catalogue.schema_target(target)), fields, "tokenizer"), base)


def from_catalogue(name: str, **changes: Any) -> Tokenizer:
    """The shipped tokenizer of folder `tokenizers/<name>`, with some fields changed.

    Raises:
        ZooError: no such folder, with the nearest one.
    """
    import yaml

    from zoo._resources import folder

    place = folder("tokenizers") / name
    if not (place / "tokenizer.yaml").is_file():
        raise ZooError(f"no tokenizer '{name}' in the catalogue" + nearest(name, names()))
    section = yaml.safe_load((place / "tokenizer.yaml").read_text(encoding="utf-8"))
    return build({**section, **changes}, place)


def names() -> list[str]:
    """The folders of the catalogue's `tokenizers/`."""
    from zoo._resources import folder

    return sorted(path.parent.name for path in folder("tokenizers").glob("*/tokenizer.yaml"))


def load(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into *directory*.

    Raises:
        ZooError: the folder holds no readable `tokenizer_config.json`.
    """
    import json

    path = Path(directory) / "tokenizer_config.json"
    try:
        section = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZooError(f"{directory} holds no tokenizer_config.json, so it is no saved tokenizer") from None
    except ValueError as error:
        raise ZooError(f"{path} is not valid JSON: {error}") from None
    return build(section, Path(directory))
