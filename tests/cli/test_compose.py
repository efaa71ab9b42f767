"""Hydra composition: what overrides and a user's own files do, and that every mistake is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo._resources import folder
from zoo.errors import ConfigError
from zoo.train.compose import assignments, compose, find, recipe_names, sweep

NAME = "hyenadna_species5"


def test_groups_and_own_values() -> None:
    data = compose(NAME)
    assert data["name"] == NAME
    assert data["data"]["id"] == "species5"
    assert data["data"]["batch_size"] == 32  # the recipe's own, over the data set's
    assert data["tokenizer"]["name"] == "char"
    assert "defaults" not in data


def test_overrides_are_typed_and_may_add_what_the_file_leaves_out() -> None:
    data = compose(
        NAME, ["seed=7", "task.optim.lr=1e-3", "data.limit=100", "trainer.loggers=[tensorboard]", "init=null"]
    )
    assert data["seed"] == 7
    assert data["task"]["optim"]["lr"] == 1e-3
    assert data["data"]["limit"] == 100
    assert data["trainer"]["loggers"] == ["tensorboard"]
    assert data["init"] is None
    assert "classes" not in compose(NAME, ["~data.classes"])["data"]


def test_data_and_tokenizer_by_name() -> None:
    data = compose(NAME, ["data=uci_splice", "tokenizer=dna-char", "tokenizer.template=none", "data.batch_size=5"])
    assert data["data"]["id"] == "uci_splice"
    assert data["data"]["batch_size"] == 5
    assert data["tokenizer"]["template"] == "none"
    assert compose(NAME, ["datamodules@data=uci_splice"])["data"]["id"] == "uci_splice"


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name: hyenadna, d_model: 8, d_inner: '${model.d_model}'}\n")
    assert compose(str(file))["model"]["d_inner"] == 8
    assert compose(str(file), ["model.d_model=12"])["model"]["d_inner"] == 12


def test_own_file_with_the_catalogues_groups(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - /recipes: hyenadna_species5\n  - override /datamodules@data: uci_splice\nseed: 3\n")
    data = compose(str(file), ["data.batch_size=9"])
    assert (data["data"]["id"], data["seed"], data["data"]["batch_size"]) == ("uci_splice", 3, 9)


def test_own_data_set_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules" / "own.yaml").write_text("name: labelled\nid: own\ntrain: {path: own.csv}\n")
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - /datamodules@data: own\nmodel: {name: hyenadna}\n")
    assert compose(str(file))["data"]["id"] == "own"
    assert compose(str(file))["name"] == "mine"
    assert compose(str(file), ["data=uci_splice"])["data"]["id"] == "uci_splice"
    assert compose(str(file), ["data=own"])["data"]["id"] == "own"


def test_a_file_without_a_data_default_takes_one_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name: hyenadna}\n")
    assert compose(str(file), ["data=uci_splice"])["data"]["id"] == "uci_splice"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modell.d_model=3"], "unknown key 'modell.d_model' in override 'modell.d_model=3' (did you mean 'model'?)"),
        (["data=species"], "unknown data 'species' (did you mean 'species5'?)"),
        (["tokenizer=dna-chr"], "unknown tokenizer 'dna-chr' (did you mean 'dna-char'?)"),
        (["datamodules@data=uci"], "asks for 'uci' of group 'datamodules'"),
        (["seed=1,2"], "sweep over them with -m"),
        (["seed"], "'seed' is not an override: write key=value"),
        (["model.d_model=[1"], "cannot be read"),
        (["name=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["hydra.run.dir=x"], "unknown key 'hydra.run.dir'"),
        (["~data.nothing"], "data.nothing"),
    ],
)
def test_mistakes_in_overrides(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(NAME, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_model: [1}\n", "not valid YAML"),
        ("model: {name: '???'}\n", "'model.name' has no value: give one as model.name=VALUE"),
        ("- a\n- b\n", "must be a mapping"),
        ("hydra: {searchpath: [pkg://os]}\n", "has a 'hydra' section"),
        ("defaults:\n  - /datamodules@data: uci_splise\n", "did you mean 'uci_splice'?"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("\xff\xfe", "not valid YAML"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        compose(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_paths(tmp_path: Path) -> None:
    assert NAME in recipe_names()
    assert find(f"{NAME}.yaml").name == NAME
    assert find(str(folder("recipes") / f"{NAME}.yaml")).file is not None
    with pytest.raises(ConfigError, match=r"unknown recipe 'hyenadna_species' \(did you mean 'hyenadna_species5'\?\)"):
        find("hyenadna_species")
    with pytest.raises(ConfigError, match="does not exist"):
        find(str(tmp_path / "no.yaml"))
    (tmp_path / "x.txt").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"must end in \.yaml"):
        find(str(tmp_path / "x.txt"))


def test_sweep_is_the_product() -> None:
    grid = sweep(["seed=1,2", "model.d_model=range(8,24,8)", "name='a,b'"])
    assert len(grid) == 4
    assert grid[0] == ["seed=1", "model.d_model=8", "name='a,b'"]
    assert grid[-1] == ["seed=2", "model.d_model=16", "name='a,b'"]
    assert compose(NAME, grid[0])["name"] == "a,b"


def test_assignments_are_typed() -> None:
    assert assignments(["a.b=3", "c=[x,'y z']", "d=null"]) == [(["a", "b"], 3), (["c"], ["x", "y z"]), (["d"], None)]
    with pytest.raises(ConfigError):
        assignments(["~a"])


def test_nothing_outside_is_read_or_written(tmp_path: Path) -> None:
    """No hydra folders in the working directory, no user configuration, the same directory before and after."""
    home = tmp_path / "home"
    (home / ".hydra").mkdir(parents=True)
    (home / ".hydra" / "config.yaml").write_text("not: [valid")
    work = tmp_path / "work"
    work.mkdir()
    code = (
        "import os, sys\nfrom zoo.train.compose import compose\nbefore = os.getcwd()\n"
        f"compose('{NAME}', ['seed=2'])\nassert os.getcwd() == before and 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${ oc.env : HOME } b", "${oc.decode:${oc.env:HOME}}"])
def test_a_recipe_cannot_read_the_environment(tiny: Path, text: str) -> None:
    tiny.write_text(tiny.read_text().replace("description: a test", f"description: '{text}'"))
    with pytest.raises(ConfigError, match="may refer to its own keys alone"):
        compose(str(tiny), [])
    with pytest.raises(ConfigError, match="own keys alone"):
        compose("hyenadna_uci_splice", [f"description='{text}'"])
