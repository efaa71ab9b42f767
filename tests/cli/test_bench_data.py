"""`zoo bench-data`: a suite in, a table out."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.train import bench

Zoo = Callable[..., tuple[int, str, str]]
SHORT = ("trainer.max_epochs=-1", "trainer.max_steps=2", "model.d_model=8")


def test_a_suite_is_run_and_resumed(zoo: Zoo, tmp_path: Path, tiny: Path) -> None:
    words = ("bench-data", "embedded", "--sets", "uci_splice", "--models", tiny, "--no-floors", "--seeds", "0,1")
    status, out, err = zoo(*words, "--out", tmp_path, *SHORT)
    assert status == 0, err
    assert "[2/2] uci_splice tiny seed 1: mcc" in out
    with (tmp_path / "embedded.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["seed"], row["steps"]) for row in rows] == [("tiny", "0", "2"), ("tiny", "1", "2")]
    status, out, _ = zoo(*words, "--out", tmp_path, *SHORT)
    assert status == 0
    assert out.count("done before") == 2
    text = (tmp_path / "embedded.md").read_text()
    assert "| uci_splice | MCC |" in text
    assert "CNN elsewhere 94" in text
    status, out, _ = zoo("bench-data", "embedded", "--out", tmp_path, "--table")
    assert status == 0
    assert "±" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embeded",), "did you mean 'embedded'"),
        (("embedded", "--sets", "uci"), "has no set 'uci'"),
        (("embedded", "--models", "hyenadnaa"), "neither a recipe, a baseline"),
        (("embedded", "--seeds", "0,a"), "--seeds takes whole numbers"),
        (("embedded", "--seeds", ","), "--seeds takes whole numbers"),
        (("gue", "--models", "lr", "--no-floors"), "is not on the Hub: download it"),
        (("gue", "--root", "/nowhere/at/all"), "folder '/nowhere/at/all' does not exist"),
        (("embedded", "--init", "hyenadna-tiny-2k"), "neither a folder, a Hub id nor a model"),
        (("embedded", "--table"), "holds no results yet"),
        (("embedded", "--set", "uci_splice"), "does not take '--set'"),
    ],
)
def test_bad_input_is_one_sentence(zoo: Zoo, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    status, _, err = zoo("bench-data", *words, "--out", tmp_path)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "embedded.csv").exists()


def test_help_imports_nothing_heavy(zoo: Zoo) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from zoo.cli.bench_data import parser; parser(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pytorch_lightning', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert bench.COLUMNS[:4] == ("suite", "set", "model", "seed")
