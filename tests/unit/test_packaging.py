"""The wheel: built, put into an empty folder, and used from there, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("recipes", "tokenizers", "datamodules", "model_cards")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def zoo(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the unpacked command with the checkout out of reach."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import zoo; "
        f"assert zoo.__file__.startswith({str(installed)!r}), zoo.__file__; "
        f"from zoo.cli.main import main; sys.exit(main({list(arguments)!r}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_catalogue_and_nothing_else(root: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "zoo/py.typed" in names
    for folder in FOLDERS:
        ours = {str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file()}
        tracked = {name for name in ours if not name.endswith(".fai")}
        packed = {name.removeprefix("zoo/_data/") for name in names if name.startswith(f"zoo/_data/{folder}/")}
        assert packed == tracked, folder
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zoo"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".ckpt"))]


def test_the_wheel_is_of_a_sane_size(wheel: Path) -> None:
    assert wheel.stat().st_size < 25 * 2**20


def test_recipes_are_found_from_the_wheel(root: Path, installed: Path) -> None:
    done = zoo(installed, "recipes", "ls")
    assert done.returncode == 0, done.stderr
    for recipe in (root / "recipes").glob("*.yaml"):
        assert recipe.stem in done.stdout
    done = zoo(installed, "validate", "hyenadna_species5", "data=uci_splice", "model.head.num_outputs=3", "--show")
    assert done.returncode == 0, done.stderr
    assert "uci_splice/train.csv" in done.stdout


def test_data_and_tokenizers_are_found_from_the_wheel(installed: Path) -> None:
    done = zoo(installed, "train", "hyenadna_coding_leptospira", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert str(installed / "zoo" / "_data" / "datamodules" / "coding_leptospira" / "train.csv") in done.stdout


def test_the_command_is_declared(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "zoo = zoo.cli.main:main" in archive.read(entry).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode()
    for extra in ("tensorboard", "wandb", "mlflow", "dev"):
        assert f"Provides-Extra: {extra}" in text
