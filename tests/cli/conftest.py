"""A recipe that trains in a second, and the command called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from zoo.cli.main import main

TINY = """
defaults:
  - /datamodules@data: uci_splice
  - /tokenizers@tokenizer: dna-char/tokenizer
  - _self_
description: a test
model:
  {name: hyenadna, d_model: 8, n_layer: 1, max_len: 64, hyena: {filter_width: 8},
   head: {kind: sequence, num_outputs: 3}}
data: {batch_size: 64, limit: 256}
task: {name: classify, optim: {lr: 3.0e-3}}
trainer: {max_steps: 4, val_every: 4, log_every: 1, monitor: val/mcc, mode: max, threads: 1, accelerator: cpu}
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def zoo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`zoo("list", "--json")` -> status, stdout, stderr."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; tests read it and never write there."""
    place = tmp_path_factory.mktemp("trained")
    file = place / "tiny.yaml"
    file.write_text(TINY, encoding="utf-8")
    assert main(["train", str(file), "--out", str(place / "run")]) == 0
    return place / "run"
