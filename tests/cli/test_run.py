"""Training and using what was trained, by the commands alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Zoo = Callable[..., tuple[int, str, str]]
DNA = "ACGTTGCAACGTACGTTTGCAACGTACGGT"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    file = tmp_path / "some.fa"
    file.write_text(f">one first\n{DNA}\n>two\n{DNA[:11]}\n{DNA[11:20]}\n>three\n{DNA.lower()}\n")
    return file


def test_train_leaves_everything(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {"artifact", "checkpoints", "metrics.csv", "curves.png"}
    held = {path.name for path in (trained / "artifact").iterdir()}
    assert held >= {"config.json", "model.safetensors", "tokenizer_config.json", "parity.safetensors", "files.json"}
    assert held >= {"README.md", "recipe.yaml", "run.json", "metrics.csv"}
    run = json.loads((trained / "artifact" / "run.json").read_text())
    assert run["data"]["files"][0]["path"] == "uci_splice/train.csv", "no private paths"
    assert {"seed", "versions", "git", "recipe"} <= set(run)


def test_dry_run_tells_and_writes_nothing(
    zoo: Zoo, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = zoo("train", tiny, "--dry-run", "data.batch_size=32")
    assert status == 0, err
    for text in (
        "parameters",
        "steps          4",
        "tokens a step  1,952",
        "memory",
        "activations",
        "uci_splice/train.csv",
    ):
        assert text in out
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_run_is_not_overwritten(zoo: Zoo, tiny: Path, trained: Path) -> None:
    status, _, err = zoo("train", tiny, "--out", trained)
    assert status == 2
    assert "--resume" in err


def test_sweep(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    status, text, err = zoo("train", tiny, "-m", "seed=0,1", "trainer.max_steps=2", "--out", out)
    assert status == 0, err
    assert (out / "seed=0" / "artifact").is_dir()
    assert (out / "seed=1" / "artifact").is_dir()
    assert "test/mcc" in text
    assert (out / "sweep.txt").read_text().strip() in text
    assert "2 runs in" in text


def test_sweep_is_checked_whole_before_it_starts(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:
    status, _, err = zoo("train", tiny, "-m", "trainer.max_steps=2,ten", "--out", tmp_path / "grid")
    assert status == 2
    assert "valid integer, got 'ten'" in err
    assert not (tmp_path / "grid").exists()


def test_finetune_from_an_artifact(zoo: Zoo, tiny: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    status, text, err = zoo("finetune", tiny, "--from", trained / "artifact", "trainer.max_steps=1", "--out", out)
    assert status == 0, err
    assert "artifact" in text
    assert f"started from | {trained / 'artifact'}" in (out / "artifact" / "README.md").read_text()


def test_finetune_from_another_architecture(zoo: Zoo, tiny: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    status, _, err = zoo("finetune", tiny, "--from", trained / "artifact", "model.d_model=16", "--out", out)
    assert status == 2
    assert "of another architecture" in err
    assert "model.d_model is 8 there, 16 here" in err
    assert not out.exists()


def test_eval_gives_the_runs_own_numbers(zoo: Zoo, trained: Path) -> None:
    status, text, err = zoo("eval", trained / "artifact", "--data", "uci_splice", "--json")
    assert status == 0, err
    metrics = json.loads(text)["metrics"]
    run = json.loads((trained / "artifact" / "run.json").read_text())["metrics"]
    assert metrics["test/mcc"] == pytest.approx(run["test/mcc"], abs=1e-4)
    assert metrics["test/loss"] == pytest.approx(run["test/loss"], abs=1e-4)
    status, text, _ = zoo("eval", trained / "artifact", "--data", "uci_splice", "--split", "val", "batch_size=7")
    assert status == 0
    assert "val/mcc" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "species5"], "the artifact tells donor, acceptor, neither apart"),
        (["--data", "chr20_splice"], "sequences of 401 tokens but the model takes at most 64"),
        (["--data", "ecoli"], "needs a language-model head"),
        (["--data", "uci_splice", "label=lable"], "has no column 'lable'"),
    ],
)
def test_eval_on_data_that_does_not_fit(zoo: Zoo, trained: Path, arguments: list[str], message: str) -> None:
    status, out, err = zoo("eval", trained / "artifact", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_predict_fasta(zoo: Zoo, trained: Path, fasta: Path, tmp_path: Path) -> None:
    status, text, err = zoo("predict", trained / "artifact", "--fasta", fasta)
    assert status == 0, err
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert list(rows[0]) == ["name", "prediction", "p_donor", "p_acceptor", "p_neither"]
    for row in rows:
        scores = {name: float(row[f"p_{name}"]) for name in ("donor", "acceptor", "neither")}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-3)
        assert row["prediction"] == max(scores, key=scores.__getitem__)
    out = tmp_path / "predicted.csv"
    one = zoo("predict", trained / "artifact", "--fasta", fasta, "--out", out, "--batch-size", "1")
    assert one == (0, "", "")
    alone = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["p_donor"] for row in alone] == [row["p_donor"] for row in rows], "batching changes nothing"


def test_predict_table(zoo: Zoo, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text(f"id,seq\nx,{DNA}\ny,{DNA[::-1]}\n")
    status, text, err = zoo("predict", trained / "artifact", "--csv", file, "--column", "seq")
    assert status == 0, err
    assert [line.split("\t")[0] for line in text.splitlines()] == ["name", "x", "y"]
    status, _, err = zoo("predict", trained / "artifact", "--csv", file, "--column", "sek")
    assert status == 2
    assert "has no column 'sek' (--column) (did you mean 'seq'?)" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("this is no FASTA\n", "FASTA"),
        (f">long\n{'ACGT' * 40}\n", "sequence 'long' has 161 tokens but the model takes at most 64"),
        (">none\n>two\nACGT\n", "none"),
    ],
)
def test_predict_on_bad_files(zoo: Zoo, trained: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.fa"
    file.write_text(content)
    out = tmp_path / "out.tsv"
    status, text, err = zoo("predict", trained / "artifact", "--fasta", file, "--out", out)
    assert (status, text) == (2, "")
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fa"], "nothing half-written"


def test_predict_with_a_language_model(zoo: Zoo, tmp_path: Path, fasta: Path) -> None:
    import torch

    from zoo import save, tokenizers
    from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

    torch.manual_seed(0)
    model = HyenaDNA(HyenaDNAConfig(d_model=8, n_layer=1, max_len=40))
    save(model, tmp_path / "lm", tokenizer=tokenizers.from_catalogue("dna-char"), task_kind="lm")
    status, text, err = zoo("predict", tmp_path / "lm", "--fasta", fasta)
    assert status == 0, err
    rows = {row["name"]: row for row in csv.DictReader(text.splitlines(), delimiter="\t")}
    assert rows["one"]["bases"] == "29", "the first base has nothing before it; [SEP] is no base"
    assert rows["two"]["bases"] == "19"
    assert rows["three"]["bases"] == "0", "lower case is unknown to this tokenizer"
    assert 1 < float(rows["one"]["bits_per_base"]) < 6


def test_verify_an_artifact(zoo: Zoo, trained: Path) -> None:
    status, text, _ = zoo("verify", trained / "artifact", "--verbose")
    assert status == 0
    assert "PASS" in text
    assert "ok   logits" in text
    assert "1 passed of 1 cases, 2 outputs compared" in text


def test_verify_a_damaged_artifact(zoo: Zoo, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "artifact", tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    status, text, _ = zoo("verify", trained / "artifact", tmp_path / "cut")
    assert status == 2
    assert "PASS" in text, "the others are told all the same"
    assert "has 1000 bytes where" in text


def test_quickstart(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    status, text, err = zoo("quickstart", "--out", out, "--steps", "2")
    assert status == 0, err
    for part in ("[1/3]", "[2/3]", "[3/3]", "bits per base", "logistic regression", "StatLog", "this HyenaDNA"):
        assert part in text
    for line in ("artifact", "card", "curves", "sequences", "predictions"):
        (path,) = [row.split()[1] for row in text.splitlines() if row.startswith(f"{line} ")][:1]
        assert Path(path).exists()
    status, _, err = zoo("quickstart", "--out", out)
    assert (status, "is not empty" in err) == (2, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.head.num_outputs=4", "model.head.num_outputs is 4 but the data has 3 classes"),
        ("data.label=lable", "has no column 'lable'"),
        ("data.train.path=nothing.csv", "data file 'nothing.csv' does not exist"),
        ("data.train.sha256=00", "is not the one the data set was published with"),
        ("model.max_len=32", "sequences of 61 tokens but the model takes at most 32"),
        ("trainer.monitor=val/mc", "did you mean 'val/mcc'?"),
        ("task=classify", "task"),
        ("data=ecoli", "which has no labels"),
        ("model.n_layer=0", "no hyenadna can be built from these numbers"),
        ("model.embed_dropout=2", "dropout probability has to be between 0 and 1"),
        ("trainer.val_every=-1", "trainer.val_every must be at least 0, got -1"),
        ("trainer.devices=0", "trainer.devices must be at least 1"),
        ("seed=-1", "seed must be at least 0"),
        ("data.num_workers=-1", "must not be negative"),
    ],
)
def test_what_a_run_refuses(zoo: Zoo, tiny: Path, tmp_path: Path, override: str, message: str) -> None:
    out = tmp_path / "run"
    overrides = [override, *(["~data.limit"] if override.startswith("data=") else [])]
    for extra in (["--out", out], ["--dry-run"]):
        status, text, err = zoo("train", tiny, *overrides, *extra)
        assert (status, text) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert not out.exists(), "nothing half-written"


def test_resuming_a_finished_run_gives_the_same(zoo: Zoo, tiny: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "again"
    shutil.copytree(trained, out)
    status, text, err = zoo("train", tiny, "--out", out, "--resume")
    assert status == 0, err
    weights = "artifact/model.safetensors"
    assert (out / weights).read_bytes() == (trained / weights).read_bytes()
    assert "test/mcc" in text


def test_resuming_with_another_recipe_is_refused(zoo: Zoo, tiny: Path, trained: Path) -> None:
    status, _, err = zoo("train", tiny, "seed=5", "--out", trained, "--resume")
    assert status == 2
    assert "seed was 0 and is 5" in err


def test_a_folder_that_cannot_be_made_is_one_sentence(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, text, err = zoo("train", tiny, "--out", tmp_path / "file" / "run")
    assert (status, text) == (2, "")
    assert err.startswith("error: cannot write into the run's folder")
    assert "Not a directory" in err


def test_a_damaged_record_of_the_recipe_is_one_sentence(zoo: Zoo, tiny: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "again"
    shutil.copytree(trained, out)
    (out / "recipe.json").write_text('{"name": ')
    status, _, err = zoo("train", tiny, "--out", out, "--resume")
    assert status == 2
    assert "recipe.json is damaged" in err
