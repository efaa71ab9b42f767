"""Whole runs on a tiny model: what they leave, what they refuse, and how they go on from one another."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import ConfigError, ZooError
from zoo.hub import artifact
from zoo.train import assemble, checkpoint_io
from zoo.train.dry_run import dry_run
from zoo.train.evaluate import evaluate
from zoo.train.predict import predict
from zoo.train.recipe import RecipeConfig, validate
from zoo.train.run import RunResult, train

HEAD = {"kind": "sequence", "num_outputs": 3, "pooling": "mean"}
MODEL = {"name": "hyenadna", "d_model": 16, "n_layer": 1, "max_len": 40, "embed_dropout": 0.0}


def write_tables(folder: Path) -> None:
    """The class is the letter that the sequence is rich in: learnable in a few steps."""
    letters = random.Random(0)
    for split, rows in (("train", 96), ("val", 30), ("test", 30)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["sequence", "label"])
            for row in range(rows):
                text = "".join(letters.choices("ACGT", weights=[6 if i == row % 3 else 1 for i in range(4)], k=24))
                writer.writerow([text, ["donor", "acceptor", "neither"][row % 3]])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder)
    return folder


def recipe(tables: Path, **changes: Any) -> RecipeConfig:
    """A valid recipe; `section__key=value` changes one field."""
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {**MODEL, "head": HEAD},
        "tokenizer": {"name": "char"},
        "data": {
            "name": "labelled",
            "root": str(tables),
            **{split: {"path": f"{split}.csv"} for split in ("train", "val", "test")},
            "classes": ["donor", "acceptor", "neither"],
            "batch_size": 16,
        },
        "task": {"name": "classify", "optim": {"lr": 0.01}},
        "trainer": {"max_steps": 30, "val_every": 10, "monitor": "val/mcc", "mode": "max", "accelerator": "cpu"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = data
        for section in sections:
            place = place[section]
        place[key] = value
    return validate(data)


@pytest.fixture(scope="module")
def finished(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(recipe(tables), tmp_path_factory.mktemp("runs") / "tiny")


def test_run_leaves_a_complete_artifact(finished: RunResult) -> None:
    assert finished.metrics["val/mcc"] > 0.8  # the task is easy
    assert finished.metrics["test/mcc"] > 0.8
    loaded = artifact.load(str(finished.artifact))
    assert loaded.classes == ["donor", "acceptor", "neither"]
    assert loaded.run["steps"] == 30
    assert loaded.run["chosen_step"] in (10, 20, 30)
    assert loaded.run["metrics"] == finished.metrics
    assert loaded.run["recipe"]["model"]["d_model"] == 16
    assert [len(item["sha256"]) for item in loaded.run["data"]["files"]] == [64, 64, 64]
    assert loaded.run["versions"]["torch"] == str(torch.__version__).split("+")[0] or loaded.run["versions"]["torch"]
    assert validate(loaded.recipe).trainer.max_steps == 30
    best = checkpoint_io.load(finished.dir / "checkpoints" / "best.ckpt")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, best["state_dict"][f"model.{name}"])
    assert all(check.passed for check in artifact.verify(finished.artifact))
    assert (finished.dir / "curves.png").stat().st_size > 1000
    rows = list(csv.DictReader((finished.dir / "metrics.csv").open(newline="")))
    assert [int(row["step"]) for row in rows if row.get("val/mcc")] == [10, 20, 30]


def test_evaluate_repeats_the_runs_numbers(finished: RunResult, tables: Path) -> None:
    section = recipe(tables).data
    for split in ("val", "test"):
        got = evaluate(str(finished.artifact), section, split)
        for name, value in got.items():
            assert value == pytest.approx(finished.metrics[f"{split}/{name}"], rel=1e-5)
    turned = evaluate(str(finished.artifact), {**section, "classes": ["acceptor", "donor", "neither"]}, "test")
    assert turned["mcc"] == pytest.approx(finished.metrics["test/mcc"])  # the artifact's order of classes holds
    with pytest.raises(ZooError, match="tells donor, acceptor, neither apart"):
        evaluate(str(finished.artifact), {**section, "classes": ["donor", "acceptor", "other"]}, "test")


def test_predict_keeps_order_and_agrees_with_the_model(finished: RunResult, tables: Path) -> None:
    with (tables / "test.csv").open(newline="") as stream:
        texts = [row["sequence"] for row in csv.DictReader(stream)]
    pairs = [(f"s{i}", text[: 24 - i % 5]) for i, text in enumerate(texts)]  # several lengths
    rows = list(predict(str(finished.artifact), iter(pairs), batch_tokens=100))
    assert [row["name"] for row in rows] == [name for name, _ in pairs]
    loaded = artifact.load(str(finished.artifact))
    for (_, text), row in zip(pairs, rows, strict=True):
        logits = loaded.model(torch.from_numpy(loaded.tokenizer.encode(text))[None])
        expected = logits[0].softmax(-1)
        assert [row[f"p_{c}"] for c in loaded.classes] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["prediction"] == loaded.classes[int(expected.argmax())]
    with pytest.raises(ZooError, match=r"'long' has 101 tokens but the model takes at most 40"):
        list(predict(loaded, [("short", "ACGT"), ("long", "A" * 100)]))
    with pytest.raises(ZooError, match="'none' is empty"):
        list(predict(loaded, [("none", " ")]))


def test_folder_of_a_run_is_not_given_to_another(finished: RunResult, tables: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.dir.rglob("*")}
    with pytest.raises(ZooError, match="already holds a run"):
        train(recipe(tables), finished.dir)
    with pytest.raises(ZooError, match=r"task\.optim\.lr was 0\.01 and is 0\.02"):
        train(recipe(tables, task__optim={"lr": 0.02}), finished.dir, resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished.dir.rglob("*")} == before


def test_resuming_a_finished_run_changes_nothing(finished: RunResult, tables: Path) -> None:
    weights = checkpoint_io.sha256_file(finished.artifact / "model.safetensors")
    again = train(recipe(tables), finished.dir, resume=True)
    assert (again.steps, again.chosen, again.metrics) == (finished.steps, finished.chosen, finished.metrics)
    assert checkpoint_io.sha256_file(again.artifact / "model.safetensors") == weights


def test_resume_passes_over_a_truncated_checkpoint(
    tables: Path, tmp_path: Path, finished: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"trainer__checkpoint_every": 7, "trainer__keep": 10}
    first = train(recipe(tables, **options), tmp_path / "run")
    for path in checkpoint_io.checkpoints(tmp_path / "run" / "checkpoints")[1:]:
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    second = train(recipe(tables, **options), tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert "passing over step-000000030.ckpt" in said
    assert "step-000000007.ckpt" in said
    assert second.metrics == first.metrics == finished.metrics


def test_fine_tuning_starts_from_the_pretrained_backbone(tables: Path, tmp_path: Path) -> None:
    fasta = tmp_path / "genome.fa"
    fasta.write_text(">chr1\n" + "".join(random.Random(1).choices("ACGT", k=4000)) + "\n")
    pretrain = validate(
        {
            "name": "pretrain",
            "model": MODEL,
            "tokenizer": {"name": "char"},
            "data": GENOME | {"files": [{"path": str(fasta)}]},
            "task": {"name": "causal_lm", "optim": {"lr": 0.01}},
            "trainer": {"max_steps": 5, "accelerator": "cpu", "monitor": "val/bits_per_base"},
        }
    )
    language = train(pretrain, tmp_path / "lm")
    assert 1.5 < language.metrics["val/bits_per_base"] < 3.5
    (row,) = predict(str(language.artifact), [("x", "ACGTACGTAC")])
    assert row["bases"] == 9
    assert row["bits_per_base"] == pytest.approx(-row["log_likelihood"] / math.log(2))

    tune = recipe(tables, model__head=HEAD | {"pooling": "last"}, init=str(language.artifact), trainer__max_steps=1)
    tune = dataclasses.replace(tune, tokenizer={})
    parts = assemble.assemble(tune)
    start = artifact.load(str(language.artifact)).model.state_dict()
    ours = parts.model.state_dict()
    shared = [name for name in ours if not name.startswith("head.")]
    assert all(torch.equal(ours[name], start[name]) for name in shared)
    assert ours["head.weight"].shape == (3, 16)
    result = train(tune, tmp_path / "tuned")
    assert artifact.load(str(result.artifact)).recipe["tokenizer"]["name"] == "char"

    with pytest.raises(ZooError, match=r"another architecture.*model\.d_model is 16 there, 32 here"):
        train(recipe(tables, model__d_model=32, init=str(language.artifact)), tmp_path / "other")
    with pytest.raises(ZooError, match=r"max_len is 39 here but 40"):
        train(recipe(tables, model__max_len=39, init=str(language.artifact)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


GENOME: dict[str, Any] = {"name": "genome", "length": 32, "batch_size": 4}


def test_contradictions_are_found_before_the_model_is_built(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any) -> Any:
        raise AssertionError("the model was built")

    monkeypatch.setattr(assemble, "build_model", build)
    cases = {
        r"num_outputs is 4 but the data has 3 classes \(donor": {"model__head": {"kind": "sequence", "num_outputs": 4}},
        r"set model\.head\.kind=sequence": {"model__head": {"kind": "lm"}},
        r"task\.kind is regression but": {"task__kind": "regression"},
        r"whose labels are multiclass: use classify": {"task": {"name": "causal_lm"}},
        r"'.*test.csv' is not the one": {"data__test": {"path": "test.csv", "sha256": "0" * 64}},
        r"'absent.csv' does not exist": {"data__train": {"path": "absent.csv"}},
        r"has no column 'lable'.*did you mean 'label'": {"data__label": "lable"},
    }
    for message, change in cases.items():
        with pytest.raises(ZooError, match=message):
            train(recipe(tables, **change), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_refusals_leave_nothing_behind(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"sequences of 25 tokens but the model takes at most 20"):
        train(recipe(tables, model__max_len=20), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"trainer\.monitor is 'val/mcc' but the data has no val split"):
        train(recipe(tables, data__val=None), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'val/mc' is not a validation metric.*did you mean 'val/mcc'"):
        train(recipe(tables, trainer__monitor="val/mc"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_without_a_val_split_the_last_weights_are_kept(tables: Path, tmp_path: Path) -> None:
    changes = {"data__val": None, "trainer__monitor": None, "trainer__max_steps": 5}
    result = train(recipe(tables, **changes), tmp_path / "run")
    assert result.chosen == 5
    assert {name.split("/")[0] for name in result.metrics} == {"test"}


def test_mixed_precision_and_accumulation(tables: Path, tmp_path: Path) -> None:
    half = train(recipe(tables, trainer__precision="bf16-mixed"), tmp_path / "bf16")
    assert half.metrics["test/mcc"] > 0.6
    assert artifact.load(str(half.artifact)).model.embed.weight.dtype == torch.float32
    gathered = train(recipe(tables, trainer__accumulate=2, data__batch_size=8, trainer__max_steps=4), tmp_path / "acc")
    assert gathered.steps == 4


def test_dry_run_counts_and_trains_nothing(tables: Path, tmp_path: Path) -> None:
    options = {"trainer__accumulate": 2, "trainer__max_steps": -1, "trainer__max_epochs": 4}
    found = dry_run(recipe(tables, **options))
    built = assemble.assemble(recipe(tables)).model
    assert found.parameters == sum(p.numel() for p in built.parameters())
    assert found.steps == 6 * 4 // 2
    assert found.tokens_per_step == 16 * 25 * 2
    assert found.memory["optimiser"] == 8 * found.parameters
    assert found.memory["activations"] > 16 * 25 * 16 * 4
    assert [Path(item["path"]).name for item in found.files] == ["train.csv", "val.csv", "test.csv"]
    assert found.recipe["model"]["hyena"]["order"] == 2
    with pytest.raises(ConfigError, match="did you mean 'val/mcc'"):
        dry_run(recipe(tables, trainer__monitor="val/mc"))


def test_missing_logger_is_named(tables: Path, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ZooError, match=r"pip install 'seqzoo\[wandb\]'"):
        train(recipe(tables, trainer__loggers=["wandb"]), tmp_path / "run")


def test_the_next_token_is_not_predicted_by_a_model_that_sees_it() -> None:
    from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
    from zoo.nn.hyena import HyenaConfig

    sizes: dict[str, Any] = {"d_model": 8, "n_layer": 1, "max_len": 16}
    both_ways = HyenaDNA(HyenaDNAConfig(**sizes, hyena=HyenaConfig(filter_width=4, bidirectional="two_sided")))
    with pytest.raises(ZooError, match="train it with masked_lm"):
        assemble.check_direction({"name": "causal_lm"}, both_ways)
    assemble.check_direction({"name": "masked_lm"}, both_ways)
    assemble.check_direction({"name": "causal_lm"}, HyenaDNA(HyenaDNAConfig(**sizes)))
