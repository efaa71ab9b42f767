"""A recipe that trains in a second, and the command called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import zoo.hub.artifact as artifact
from zoo.cli.main import main
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.generator import GENERator, GENERatorConfig
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.tokenizers import build

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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small untrained models: letters left to right, 3-mers left to right, masked letters, two classes of letters."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    letters = build({"name": "char"})
    kmers = build({"name": "kmer", "k": 3, "align": "left"})
    hyena = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=130))
    decoder = GENERator(
        GENERatorConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=1, d_inner=32, vocab_size=kmers.vocab_size)
    )
    encoder = DNABERT2(DNABERT2Config(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=letters.vocab_size))
    classifier = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=130))
    classifier.reset_head(2)
    made = {
        "letters": (hyena, letters), "kmers": (decoder, kmers), "masked": (encoder, letters),
        "classes": (classifier, letters),
    }  # fmt: skip
    for name, (model, tokenizer) in made.items():
        with torch.no_grad():  # initial weights are so small that all scores would be alike
            for parameter in model.parameters():
                parameter.mul_(8) if parameter.dim() > 1 else None
        outputs = {"classes": ["no", "yes"], "task_kind": "multiclass"} if name == "classes" else {}
        artifact.save(model, place / name, tokenizer=tokenizer, **outputs)
    return {name: place / name for name in made}
