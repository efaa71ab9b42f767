"""Recipes from YAML: Hydra composes files and overrides into one plain dict; nothing is ever instantiated from it.

Hydra's config path is the catalogue's root, so its groups are the catalogue's folders. Hydra's errors are turned
into one sentence each; checking the result against the schemas is `zoo.train.recipe.validate`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zoo._resources import folder, root
from zoo.errors import ConfigError, nearest
from zoo.train.recipe import RecipeConfig

# what `data=NAME` and `tokenizer=NAME` on the command line mean to Hydra
_GROUPS = {
    "data": ("datamodules", "datamodules@data", "{}"),
    "tokenizer": ("tokenizers", "tokenizers@tokenizer", "{}/tokenizer"),
}


@dataclass(frozen=True)
class Source:
    """Where a recipe stands: its name, and its file when it is not one of the catalogue's."""

    name: str
    file: Path | None = None


def recipe_names() -> list[str]:
    """The recipes of the catalogue, sorted."""
    place = folder("recipes")
    return sorted(str(path.relative_to(place).with_suffix("")) for path in place.rglob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        ConfigError: as `find`.
    """
    source = find(name_or_path)
    return source.file or folder("recipes") / f"{source.name}.yaml"


def find(name_or_path: str) -> Source:
    """A recipe of the catalogue by its name, or a user's own by its path.

    Raises:
        ConfigError: unknown name (with the nearest one), or a path without a readable YAML file.
    """
    names = recipe_names()
    name = name_or_path.removesuffix(".yaml")
    path = Path(name_or_path).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        return Source(path.stem, path.resolve())
    if name in names:
        return Source(name)
    if path.is_file():
        raise ConfigError(f"recipe file '{name_or_path}' must end in .yaml")
    if path.suffix in (".yaml", ".yml") and path.parent != Path("."):
        raise ConfigError(f"recipe file '{name_or_path}' does not exist")
    raise ConfigError(f"unknown recipe '{name_or_path}'" + nearest(name, names) + "; `zoo recipes ls` lists them all")


def compose(name_or_path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe with *overrides* (`key=value` in Hydra's grammar) as a plain dict, all interpolations resolved.

    `data=NAME` and `tokenizer=NAME` take another data set or tokenizer of the catalogue. A user's own file may name
    the catalogue's in its defaults list (`- /datamodules@data: uci_splice`), and folders of the same names beside it.

    Raises:
        ConfigError: anything wrong with the file or an override, in one sentence.
    """
    source = find(name_or_path)
    translated = [_translate(text, source) for text in overrides]
    data = _run(source, translated)
    if not isinstance(data, dict):
        raise ConfigError(f"recipe '{name_or_path}' must be a mapping of keys to values")
    data.setdefault("name", source.name.replace("/", "-"))
    return data


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of overrides that list several values (`seed=1,2`, `model.d_model=range(32,96,32)`)."""
    choices = []
    for text in overrides:
        override = _parse(text)
        key = override.get_key_element()
        if override.is_sweep_override():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(combination) for combination in itertools.product(*choices)]


def assignments(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`a.b=3` as `(["a", "b"], 3)`, typed by Hydra's grammar.

    Raises:
        ConfigError: an override that assigns nothing, or several values.
    """
    found = []
    for text in overrides:
        override = _parse(text)
        if "=" not in text or text.startswith("~") or override.is_sweep_override():
            raise ConfigError(f"'{text}' is not an assignment of one value: write key=value")
        found.append((override.key_or_group.split("."), _plain(override.value())))
    return found


def _plain(value: Any) -> Any:
    """Values of Hydra's grammar (quoted strings among them) as JSON values."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "text", value)


def _parse(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"'{text}' is not an override: write key=value, as in trainer.max_steps=100")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"override '{text}' cannot be read ({reason}); quote values that hold brackets or commas"
        ) from None
    return override


def _translate(text: str, source: Source) -> list[str]:
    """The forms in which Hydra is to be asked for one override, the first that it accepts counts."""
    from hydra.core.override_parser.types import OverrideType

    override = _parse(text)
    if override.is_sweep_override():
        raise ConfigError(f"override '{text}' lists several values: sweep over them with -m, or quote the value")
    key = override.key_or_group
    top = key.split(".")[0]
    known = [item.name for item in fields(RecipeConfig)]
    if override.package is not None and top in ("datamodules", "tokenizers"):
        return [text, "+" + text.lstrip("+")]
    if top not in known:
        raise ConfigError(f"unknown key '{key}' in override '{text}'" + nearest(top, known))
    value = override.value()
    if key in _GROUPS and isinstance(value, str) and override.type is not OverrideType.DEL:
        group, target, option = _GROUPS[key]
        names = _options(group, source)
        if value not in names:
            raise ConfigError(f"unknown {key} '{value}'" + nearest(value, names))
        chosen = f"{target}={option.format(value)}"
        return [chosen, "+" + chosen]
    if override.type in (OverrideType.CHANGE, OverrideType.ADD):
        # the schema, not the YAML, decides which keys exist: it knows those that the file leaves at their defaults
        return ["++" + text.lstrip("+")]
    return [text]


def _options(group: str, source: Source) -> list[str]:
    places = [folder(group), *([source.file.parent / group] if source.file else [])]
    found = {path.parent.name if group == "tokenizers" else path.stem for place in places
             for path in place.glob("*/tokenizer.yaml" if group == "tokenizers" else "*.yaml")}  # fmt: skip
    return sorted(found)


def _run(source: Source, overrides: list[list[str]]) -> Any:
    """Compose; where an override has a second form, take it if the first has no match in the defaults list."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if source.file is None:
        place, primary, extra = root(), None, [f"+recipes={source.name}"]
    else:
        _refuse_hydra_section(source.file)
        place, primary, extra = source.file.parent, source.file.name, [f"hydra.searchpath=['file://{root()}']"]
    first = [forms[0] for forms in overrides]
    where = f"recipe '{source.file or source.name}'"
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(place), version_base="1.3"):
            warnings.simplefilter("ignore")  # about a missing _self_: the file's own values come last, as one expects
            try:
                composed = hydra_compose(primary, overrides=[*extra, *first])
            except MissingConfigException:
                raise
            except HydraException as error:
                second = [f[-1] if f"'{f[0].split('=')[0]}'" in str(error) else f[0] for f in overrides]
                if second == first:
                    raise
                composed = hydra_compose(primary, overrides=[*extra, *second])
            _refuse_resolvers(OmegaConf.to_container(composed, resolve=False), where)
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file or "")
        group, _, option = missing.rpartition("/")
        choices = [str(choice) for choice in error.options or ()]
        what = f"'{option}' of group '{group}'" if group else f"'{missing}'"
        raise ConfigError(f"{where} asks for {what}, which does not exist" + nearest(option, choices)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_omegaconf_problem(error)}") from None
    except (HydraException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be composed: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if (found := re.search(r"invalid literal for int\(\) with base 10: '(.*)'", str(error))) is None:
            raise
        keys = [forms[0].lstrip("+") for forms in overrides if found[1] in forms[0].split("=")[0].split(".")]
        named = f"'{keys[0]}'" if keys else f"a key with '{found[1]}'"
        raise ConfigError(f"{where}: {named} goes into a list, whose items are numbered (.0, .1, ...)") from None
    finally:
        GlobalHydra.instance().clear()


def _refuse_resolvers(value: Any, where: str) -> None:
    """`${oc.env:HF_TOKEN}` in a recipe from elsewhere would write this machine's secrets into the run's record."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, where)
    elif isinstance(value, str) and (found := re.search(r"\$\{\s*([\w.]+)\s*:", value)):
        raise ConfigError(
            f"{where} calls the resolver '{found[1]}' in {value!r}: a recipe may refer to its own keys alone"
        )


def _refuse_hydra_section(file: Path) -> None:
    """A `hydra:` section could add search paths and plugins, which a recipe from elsewhere must not."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = _yaml_problem(error) if isinstance(error, yaml.YAMLError) else str(error)
        raise ConfigError(f"recipe '{file}' is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"recipe '{file}' must be a mapping of keys to values")
    if "hydra" in content:
        raise ConfigError(f"recipe '{file}' has a 'hydra' section, which a recipe may not have")


def _yaml_problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else text


def _omegaconf_problem(error: Any) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    if type(error).__name__ == "MissingMandatoryValue":
        return f"'{key}' has no value: give one as {key}=VALUE"
    return f"'{key}': {message}" if key else message
