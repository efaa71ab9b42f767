"""Configs at the boundary: strict types, unknown keys with the nearest valid one, and a schema that costs no torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from zoo import catalogue
from zoo.config import config, from_dict, resolve, schema, to_dict
from zoo.errors import ConfigError, nearest
from zoo.train.recipe import TrainerConfig, validate


@config
class Inner:
    width: int = 4
    rate: float = 0.1


@config
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    many: tuple[Inner, ...] = ()
    maybe: int | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name must not be bad")


def test_round_trip_is_exact() -> None:
    value = from_dict(Outer, {"name": "a", "inner": {"width": 7}, "sizes": [3], "many": [{"rate": 1}]})
    assert value == Outer(name="a", inner=Inner(width=7), sizes=(3,), many=(Inner(rate=1.0),))
    plain = to_dict(value)
    assert json.loads(json.dumps(plain)) == plain
    assert from_dict(Outer, plain) == value


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().width = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Inner(3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "iner": {}}, "unknown key 'x.iner' (did you mean 'inner'?)"),
        ({"name": "a", "inner": {"widht": 3}}, "unknown key 'x.inner.widht' (did you mean 'width'?)"),
        ({}, "missing key 'x.name'"),
        ({"name": 3}, "x.name: value should be a valid string, got 3"),
        ({"name": "a", "inner": {"width": "4"}}, "x.inner.width: value should be a valid integer, got '4'"),
        ({"name": "a", "inner": {"width": 4.5}}, "x.inner.width"),
        ({"name": "a", "inner": {"width": True}}, "x.inner.width"),
        ({"name": "a", "sizes": [1, "b"]}, "x.sizes.1"),
        ({"name": "a", "many": ["b"]}, "x.many.0: value should be an object such as {width: b} (keys: width, rate)"),
        ({"name": "bad"}, "x: name must not be bad"),
        ({"name": "a", "maybe": object()}, "holds a value that JSON cannot"),
    ],
)
def test_mistakes_are_one_sentence(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, data, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nearest_names() -> None:
    assert nearest("hyenadan", ["hyenadna", "dnabert2"]) == " (did you mean 'hyenadna'?)"
    assert nearest("zzz", ["a", "b"]) == " (known: a, b)"
    assert nearest("x", []) == ""


TABLES = {
    "model": catalogue.MODELS,
    "mixer": catalogue.MIXERS,
    "tokenizer": catalogue.TOKENIZERS,
    "data": catalogue.DATAMODULES,
    "task": catalogue.TASKS,
}
TARGETS = [(kind, name, target) for kind, table in TABLES.items() for name, target in table.items()]


@pytest.mark.parametrize(("kind", "name", "target"), TARGETS, ids=[f"{kind}-{name}" for kind, name, _ in TARGETS])
def test_the_schema_read_without_torch_is_the_real_one(kind: str, name: str, target: str) -> None:
    light = schema(catalogue.schema_target(target))
    real = resolve(catalogue.schema_target(target))

    def shape(cls: type) -> list[tuple[str, Any]]:
        return [(item.name, str(item.type)) for item in dataclasses.fields(cls)]

    assert shape(light) == shape(real)
    assert light.__doc__
    assert "Attributes:" in str(light.__doc__), "the fields are documented"
    documented = " ".join(str(parent.__doc__) for parent in light.__mro__)
    missing = [item.name for item in dataclasses.fields(light) if item.name not in documented]
    assert not missing, missing


def test_trainer_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="trainer needs max_steps or max_epochs"):
        from_dict(TrainerConfig, {}, "trainer")


RECIPE: dict[str, Any] = {
    "name": "x",
    "model": {"name": "hyenadna", "head": {"kind": "sequence", "num_outputs": 3}},
    "tokenizer": {"name": "char"},
    "data": {"name": "labelled", "train": {"path": "a.csv"}},
    "task": {"name": "classify"},
    "trainer": {"max_steps": 3},
}


def test_a_recipe_is_filled_with_defaults() -> None:
    recipe = validate(RECIPE)
    assert recipe.model["n_layer"] == 2
    assert recipe.task["optim"]["schedule"] == "cosine"
    assert validate(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"name": "hyenadan"}, "unknown model name 'hyenadan' (did you mean 'hyenadna'?)"),
        ("model", {"name": "hyenadna", "n_layers": 3}, "unknown key 'model.n_layers' (did you mean 'n_layer'?)"),
        ("model", {}, "model needs a 'name'"),
        ("trainer", {"max_steps": "ten"}, "trainer.max_steps: value should be a valid integer, got 'ten'"),
        ("task", {"name": "clasify"}, "did you mean 'classify'"),
        ("data", {"name": "labelled"}, "needs at least one of train, val and test"),
        ("tokenizer", {"name": "char", "template": "septic"}, "tokenizer.template"),
    ],
)
def test_recipe_mistakes(section: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**RECIPE, section: change})
    assert message in str(caught.value)


def test_a_dotted_path_is_data_not_code() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model\._target_'"):
        validate({**RECIPE, "model": {"name": "hyenadna", "_target_": "os.system"}})
