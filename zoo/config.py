"""Configs: frozen keyword-only dataclasses of JSON values, checked strictly where data enters the program.

A config class stands in the file of the class it builds, and that file imports torch. To check a recipe without
paying for torch, `schema` reads such a file as text and executes its config classes alone; a config class may
therefore use only builtins, typing, dataclasses, and names from other config classes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from zoo.errors import ConfigError, nearest

T = TypeVar("T")
_LIGHT = ("dataclasses", "typing", "collections", "zoo.config", "zoo.errors")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen keyword-only dataclass whose validation refuses unknown keys and inexact types."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
    return cls


def to_dict(value: Any) -> Any:
    """The JSON form of a config: nested dicts and lists, no tuples, ready for YAML, JSON and Lightning checkpoints."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build config *cls* from plain *data*; *where* is the dotted path shown in errors.

    Raises:
        ConfigError: unknown key (with the nearest valid one), missing key, wrong type, or a value out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    if isinstance(data, cls):
        return data
    try:
        return TypeAdapter(cls).validate_json(json.dumps(to_dict(data)))
    except ValidationError as error:
        raise ConfigError(_explain(cls, error.errors()[0], where)) from None
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__} holds a value that JSON cannot: {error}") from None


def _explain(cls: type, problem: Any, where: str) -> str:
    path = [str(part) for part in problem["loc"]]
    place = ".".join([where, *path] if where else path) or cls.__name__
    kind, value = problem["type"], problem.get("input")
    if kind == "unexpected_keyword_argument":
        return f"unknown key '{place}'" + nearest(path[-1], _keys_at(cls, path[:-1]))
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"missing key '{place}'"
    if kind == "value_error":  # raised by a config's own __post_init__
        return f"{place}: {problem['ctx']['error']}" if place != cls.__name__ else str(problem["ctx"]["error"])
    keys = _keys_at(cls, path) if kind.startswith("dataclass") else []
    if keys:
        example = f"{{{keys[0]}: {value}}} (keys: {', '.join(keys)})"
        return f"{place}: value should be an object such as {example}, got {value!r}"
    message = problem["msg"]
    expected = message[0].lower() + message[1:]
    return f"{place}: {expected.replace('input', 'value', 1)}, got {value!r}"


def _keys_at(cls: Any, path: list[str]) -> list[str]:
    """Field names of the dataclass found by following *path* from *cls*."""
    for part in path:
        if part.isdigit():  # an item of a list: its type was taken from the list's arguments already
            continue
        if not dataclasses.is_dataclass(cls):
            return []
        hints = _hints(cls if isinstance(cls, type) else type(cls))
        inner = hints.get(part)
        args = [arg for arg in getattr(inner, "__args__", ()) if dataclasses.is_dataclass(arg)]
        cls = inner if dataclasses.is_dataclass(inner) else (args[0] if args else None)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _hints(cls: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(cls)


def resolve(target: str) -> Any:
    """Import `"package.module:Name"`. Only ever called with strings of the literal tables in `zoo.catalogue`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def schema(target: str) -> type:
    """The config class `"zoo.models.x:XConfig"` without importing what its module imports (torch above all).

    Returns the real class when its module is already loaded, otherwise an equal one executed from the source.
    """
    module, _, name = target.partition(":")
    loaded = sys.modules.get(module)
    return getattr(loaded if loaded and hasattr(loaded, name) else _light_module(module), name)


def _belongs(node: ast.stmt) -> bool:
    """Whether a statement of a module is part of its config classes: themselves, light imports, literals they use."""
    if isinstance(node, ast.ClassDef):
        return any(ast.unparse(decorator) == "config" for decorator in node.decorator_list)
    if isinstance(node, ast.Import):
        return all(item.name.split(".")[0] in _LIGHT for item in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        return node.module == "__future__" or node.module in _LIGHT or node.module.split(".")[0] in _LIGHT[:3]
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return _is_literal(node.value) or (
            isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal[")
        )
    return False


def _light_module(module: str) -> types.ModuleType:
    alias = f"zoo-schema:{module}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    light = types.ModuleType(alias)
    sys.modules[alias] = light
    kept: list[ast.stmt] = []
    for node in tree.body:
        if _belongs(node):
            kept.append(node)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zoo."):
            wanted = {item.name: item.asname or item.name for item in node.names}
            if any(_defines_config(node.module, name) for name in wanted):
                inner = _light_module(node.module)
                vars(light).update({to: getattr(inner, name) for name, to in wanted.items() if hasattr(inner, name)})
    exec(compile(ast.Module(kept, []), spec.origin, "exec"), vars(light))  # our own source, never a downloaded file
    return light


def _defines_config(module: str, name: str) -> bool:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).read_text(encoding="utf-8")
    return f"@config\nclass {name}" in text


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True
