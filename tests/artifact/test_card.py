"""Cards of trained artifacts: true, whole, and with code that runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from zoo import tokenizers
from zoo.hub.card import artifact_card, front_matter, label, table
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn.heads import HeadConfig

RUN = {
    "name": "splice",
    "seed": 4,
    "steps": 100,
    "chosen_step": 80,
    "epochs": 2.5,
    "monitor": "val/mcc",
    "metrics": {"val/mcc": 0.91, "test/mcc": 0.9, "test/accuracy": 0.95},
    "timing": {"train_seconds": 12.3},
    "hardware": {"gpu": None, "threads": 2, "machine": "x86_64"},
    "versions": {"torch": "2.0"},
    "git": {"commit": "abc", "changed": False},
    "data": {
        "task_kind": "multiclass",
        "classes": ["donor", "acceptor", "neither"],
        "files": [{"path": "/home/somebody/train.csv", "sha256": "f" * 64}],
    },
}
RECIPE = {
    "name": "splice",
    "description": "a test",
    "model": {"name": "hyenadna"},
    "data": {"name": "labelled", "id": "uci_splice", "title": "Splice", "licence": "CC-BY-4.0", "batch_size": 32},
    "task": {
        "name": "classify",
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.999], "schedule": "cosine"},
    },
    "trainer": {"precision": "32-true", "grad_clip": 1.0},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    head = HeadConfig(kind="sequence", num_outputs=3)
    model = HyenaDNA(HyenaDNAConfig(d_model=8, n_layer=1, max_len=64, head=head))
    metrics = tmp_path / "metrics.csv"
    with metrics.open("w", newline="") as stream:
        csv.writer(stream).writerows([["step", "train/loss"], [1, 1.0]])
    tokenizer = tokenizers.from_catalogue("dna-char")
    return zoo.save(model, tmp_path / "art", tokenizer=tokenizer, recipe=RECIPE, run=RUN, metrics_csv=metrics)


def test_everything_known_is_on_the_card(saved: Path) -> None:
    text = (saved / "README.md").read_text()
    for fact in (
        "# splice",
        "donor, acceptor, neither",
        "CC-BY-4.0",
        "f" * 64,
        "`train.csv`",
        "0.9000",
        "0.9500",
        "random weights",
    ):
        assert fact in text
    for fact in (
        "| seed | 4 |",
        "| optimiser steps | 100 |",
        "| weights taken from step | 80 |",
        "best val/mcc",
        "| commit | abc |",
    ):
        assert fact in text
    assert "/home/somebody" not in text
    assert not re.search(r"(?i)more information|todo|tbd|n/a|\bNone\b|\{\}|\|\s*\|\s*$", text.replace("|  |  |", ""))


def test_the_header_is_what_the_hub_reads(saved: Path) -> None:
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    card = ModelCard.load(saved / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert card.data.library_name == "seqzoo"
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "text-classification"
    header = yaml.safe_load((saved / "README.md").read_text().split("---\n")[1])
    name, results = model_index_to_eval_results(header["model-index"])
    assert name == "splice"
    assert {(result.metric_type, result.metric_value) for result in results} == {("mcc", 0.9), ("accuracy", 0.95)}


def test_its_code_runs(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(saved)
    blocks = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, "card", "exec"), {})
    assert "torch.Size([1, 3])" in capsys.readouterr().out
    from zoo.cli.main import main

    commands = re.findall(r"```sh needs-input\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    Path("sequences.fa").write_text(">a\nACGT\n")
    for line in "".join(commands).splitlines():
        assert line.startswith("zoo ")
        assert main(line.split()[1:]) == 0


def test_an_artifact_without_a_run_has_a_shorter_card(tmp_path: Path) -> None:
    zoo.save(HyenaDNA(HyenaDNAConfig(d_model=8, n_layer=1, max_len=40)), tmp_path / "art")
    text = artifact_card(zoo.load(tmp_path / "art"))
    for section in ("## Training", "## Measured", "license"):
        assert section not in text
    assert "It was not measured on a test split." in text
    assert "\n\n\n" not in text


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    zoo.save(HyenaDNA(HyenaDNAConfig(d_model=8, n_layer=1, max_len=40)), tmp_path / "art", card="# mine\n")
    assert (tmp_path / "art" / "README.md").read_text() == "# mine\n"


def test_the_record_holds_no_private_path(saved: Path) -> None:
    run = json.loads((saved / "run.json").read_text())
    assert run["data"]["files"][0]["path"] == "train.csv"


def test_small_parts() -> None:
    assert label("val/mcc") == "Matthews correlation"
    assert label("test/some_thing") == "some thing"
    assert table(("a",), [("x|y",)]) == "| a |\n|---|\n| x\\|y |"
    assert front_matter({"a": None, "b": [], "c": "d"}) == "---\nc: d\n---\n\n"
