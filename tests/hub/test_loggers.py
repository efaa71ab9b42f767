"""The optional loggers: what a run sends arrives, and one that is not installed is named."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.errors import ConfigError, ZooError
from zoo.train.compose import compose
from zoo.train.progress import extra_loggers
from zoo.train.recipe import validate


@pytest.mark.slow
def test_trackio_keeps_the_metrics(tmp_path: Path) -> None:
    """In a process of its own, since trackio reads its folder when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "from pathlib import Path\nfrom zoo.train.progress import extra_loggers\n"
        f"(logger,) = extra_loggers(('trackio',), Path({str(tmp_path)!r}), 'first')\n"
        "logger.log_metrics({'train/loss': 1.5}, step=1)\nlogger.log_metrics({'train/loss': 0.5}, step=2)\n"
        "logger.finalize('success')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRACKIO_DIR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("*.db")
    with sqlite3.connect(file) as database:
        query = "select step, metrics from metrics where run_name = 'first' order by step"
        rows = database.execute(query).fetchall()
    assert [step for step, _ in rows] == [1, 2]
    assert "0.5" in str(rows[1][1])


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (logger,) = extra_loggers(("tensorboard",), tmp_path, "first")
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.finalize("success")
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_mlflow_keeps_the_metrics_in_a_store_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # later releases ask for it, and prefer a database
    (logger,) = extra_loggers(("mlflow",), tmp_path, "first")
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.log_metrics({"train/loss": 0.5}, step=2)
    logger.finalize("success")
    (file,) = (path for path in tmp_path.rglob("loss") if path.parent.name == "train")
    assert [line.split()[1:3] for line in file.read_text().splitlines()] == [["1.5", "1"], ["0.5", "2"]]
    assert any("first" in path.read_text() for path in tmp_path.rglob("meta.yaml")), "the run has its name"


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_deepspeed_is_taken_and_named_where_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.train.sharding import strategy

    recipe = validate(compose("hyenadna_uci_splice", [f"trainer.strategy={name}"]))
    assert recipe.trainer.strategy == name
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ZooError, match=rf"trainer.strategy={name} needs DeepSpeed.*pip install 'seqzoo\[deepspeed\]'"):
        strategy(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ZooError, match="needs a GPU, and PyTorch sees none"):
        strategy(name)
    assert strategy("ddp") == "ddp"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_recipes_take_every_logger(name: str) -> None:
    recipe = validate(compose("hyenadna_uci_splice", [f"trainer.loggers=[{name}]"]))
    assert recipe.trainer.loggers == (name,)


def test_an_unknown_logger_and_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="trackio"):
        validate(compose("hyenadna_uci_splice", ["trainer.loggers=[trackoi]"]))
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(ZooError, match=r"pip install 'seqzoo\[trackio\]'"):
        extra_loggers(("trackio",), tmp_path, "first")
