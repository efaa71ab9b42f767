"""The benchmark runner: floors, results that resume, recipes put onto a set, tables."""

from __future__ import annotations

import csv
import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, ZooError
from zoo.train import bench, bench_baselines
from zoo.train.bench_baselines import SmallCNN, encode, features, fit, one_hot, read_rows, regression
from zoo.train.bench_report import markdown, table_rows
from zoo.train.bench_suites import BenchSet, Suite, load_suite

ITEM = BenchSet("toy", "toy", 40, 2, "mcc", {"A model": 50.0})
SUITE = Suite("toy", "A toy suite", "csv", {"toy": ITEM}, sources={"A model": "a paper"})


def motif_rows(count: int, seed: int) -> list[tuple[str, int]]:
    """Label 1 holds GATTACA somewhere, label 0 does not."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        text = "".join(draw.choice("ACGT") for _ in range(40)).replace("GATTACA", "GATTACC")
        if i % 2:
            at = draw.randrange(33)
            text = text[:at] + "GATTACA" + text[at + 7 :]
        rows.append((text, i % 2))
    return rows


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A suite of one set in GUE's layout."""
    for split, count, seed in (("train", 400, 0), ("dev", 100, 1), ("test", 100, 2)):
        file = tmp_path / "files" / "toy" / f"{split}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([("sequence", "label"), *motif_rows(count, seed)])
    return tmp_path / "files"


def plan(toy: Path, models: list[str], **changes: Any) -> bench.Plan:
    return bench.Plan(SUITE, [ITEM], models, changes.pop("seeds", [0, 1]), toy.parent / "out", toy, **changes)


def test_codes_and_kmers() -> None:
    codes = encode([b"ACGTN", b"acg"])
    assert codes.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 4, 4]]
    shares = features(encode([b"ACGTACGT", b"AAAANAAAA"]), "4-mer")
    assert shares.shape == (2, 256)
    assert shares[1, 0] == 1.0, "the 4-mers with N are left out"
    np.testing.assert_allclose(shares.sum(1), 1.0)
    assert np.count_nonzero(shares[0]) == 4
    assert features(codes, "one-hot").shape == (2, 20)


def test_regression_is_the_minimum() -> None:
    x, labels = torch.randn(200, 5), torch.randint(0, 3, (200,))
    weight = regression(x, labels, torch.zeros(3, 6), 1e-2, steps=200).requires_grad_()
    logits = x @ weight[:, :-1].T + weight[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, labels) + 1e-2 * weight[:, :-1].square().sum()
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.abs().max() < 1e-3


def test_regression_agrees_with_another_implementation() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    x, labels = torch.randn(300, 8), torch.randint(0, 3, (300,))
    x[:, 0] += labels
    weight = regression(x, labels, torch.zeros(3, 9), 1e-3, steps=500)
    # C weighs the summed loss against half the squared norm
    other = linear.LogisticRegression(C=1 / (2 * 1e-3 * 300), max_iter=2000, tol=1e-8).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(weight[:, :-1].numpy(), other.coef_, atol=2e-3)


def test_the_network_has_the_announced_size() -> None:
    assert 57_000 < sum(p.numel() for p in SmallCNN(2, 60).parameters()) < 62_000
    codes = torch.tensor([[0, 1, 2, 3, 4] * 12] * 4)
    x = one_hot(codes)
    assert x.shape == (4, 4, 60)
    assert x[0, :, :5].argmax(0).tolist() == [0, 1, 2, 3, 0]
    assert not x[0, :, 4].any()
    assert SmallCNN(3, 60)(x).shape == (4, 3)


def test_the_network_sees_places_and_words_anywhere() -> None:
    """A word's place changes what the head reads in its parts, and not its maximum and mean over the whole."""
    torch.manual_seed(0)
    model = SmallCNN(2, 400).eval()
    with torch.no_grad():
        model.out.weight.normal_()
    plain = encode([b"A" * 400])
    early, late = plain.clone(), plain.clone()
    early[0, 100:108] = late[0, 300:308] = encode([b"GATTACAG"])[0]
    read = lambda codes: model(one_hot(codes))
    assert not torch.allclose(read(early), read(late), atol=1e-3)
    with torch.no_grad():
        model.out.weight[:, : 16 * 56] = 0
    torch.testing.assert_close(read(early), read(late))
    assert not torch.allclose(read(early), read(plain), atol=1e-4)


def test_floors_learn_what_can_be_learned(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.train.bench_suites import section

    monkeypatch.setattr(bench_baselines, "BATCH", 8)
    data = section(SUITE, ITEM, toy)
    splits, classes = read_rows(data)
    assert classes == 2
    assert {name: len(rows.labels) for name, rows in splits.items()} == {"train": 400, "val": 100, "test": 100}
    linear, network = fit("lr", data, 0), fit("cnn", data, 0)
    assert linear.test["mcc"] > 0.5, "5-mers of the motif give it away"
    assert network.test["mcc"] > 0.6
    assert linear.choice.startswith(("4-mer", "5-mer"))
    assert fit("lr", data, 7).test == linear.test


def test_results_resume_and_never_run_twice(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def fake(name: str, section: dict[str, Any], seed: int) -> bench_baselines.Fitted:
        ran.append((name, seed))
        if len(ran) == 2:
            raise KeyboardInterrupt
        scores = {"mcc": 0.5 + seed / 10, "accuracy": 0.7, "f1": 0.7}
        return bench_baselines.Fitted(scores, scores, "epoch 1", 10, 1.0)

    monkeypatch.setattr(bench_baselines, "fit", fake)
    lines: list[str] = []
    todo = plan(toy, ["lr", "cnn"])
    with pytest.raises(KeyboardInterrupt):
        bench.run(todo, lines.append)
    assert [bench.key(row) for row in bench.read_results(todo.results)] == [("toy", "lr", "0")]
    rows = bench.run(todo, lines.append)
    assert ran == [("lr", 0), ("cnn", 0), ("cnn", 0), ("cnn", 1)], "the regression has no seeds"
    assert any("done before" in line for line in lines)
    assert [bench.key(row)[1:] for row in rows] == [("cnn", "0"), ("cnn", "1"), ("lr", "0")]
    assert bench.run(todo, lines.append) == rows
    assert len(ran) == 4
    header, table = table_rows(SUITE, rows)
    assert header == ["set", "metric", "regression (floor)", "small CNN (floor)", "published"]
    assert table == [["toy", "MCC", "50.0", "55.0 ± 7.1 *", "A model 50"]]
    text = markdown(SUITE, rows)
    assert "| toy | MCC | 50.0 | 55.0 ± 7.1 * | A model 50 |" in text
    assert "- A model: a paper" in text


def _append(path: Path, seed: int) -> None:
    for number in range(5):
        row = dict.fromkeys(bench.COLUMNS, "0") | {"set": "s", "model": f"m{number}", "seed": str(seed)}
        bench.append(path, row)


def test_two_processes_share_a_results_file(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(path, seed)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({bench.key(row) for row in bench.read_results(path)}) == 10


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ZooError, match="not a file of benchmark results"):
        bench.read_results(tmp_path / "toy.csv")


def test_which_recipe_a_model_means() -> None:
    sets = load_suite("embedded").sets
    assert bench.recipe_for("hyenadna", sets["species5"]) == ("hyenadna_species5", True)
    assert bench.recipe_for("hyenadna_species5", sets["species5"]) == ("hyenadna_species5", True)
    assert bench.recipe_for("hyenadna_species5", sets["uci_splice"]) == ("hyenadna_species5", False)
    with pytest.raises(ConfigError, match="did you mean"):
        bench.recipe_for("hyenadna_specis5", sets["uci_splice"])
    assert {"hyenadna", "dnabert2_small", "generator_small"} <= set(bench.default_models([sets["species5"]]))


def test_the_tokenizer_of_every_benchmark_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import tokenizers
    from zoo.train.compose import compose, recipe_names

    monkeypatch.chdir(tmp_path)
    starts = ("hyenadna_", "dnabert2_small_", "generator_small_")
    names = [name for name in recipe_names() if name.startswith(starts)]
    assert "dnabert2_small_species5" in names
    for name in names:
        recipe = compose(name)
        rows = recipe["model"].get("vocab_size", 12)
        assert tokenizers.build(recipe["tokenizer"]).vocab_size <= -(-rows // 8) * 8, name


def test_a_recipe_of_another_set_gets_outputs_and_length(toy: Path) -> None:
    from zoo.train.bench_suites import section

    data = section(SUITE, ITEM, toy)
    recipe = bench.compose_for(plan(toy, []), ITEM, "hyenadna_species5", data)
    assert recipe["model"]["head"]["num_outputs"] == 2
    assert recipe["data"]["train"]["path"].endswith("toy/train.csv")
    assert recipe["data"]["rc_augment"] is True, "how rows are read stays as in the recipe"
    assert recipe["model"]["max_len"] == 1024
    longer = BenchSet("toy", "toy", 2000, 2, "mcc")
    assert bench.compose_for(plan(toy, []), longer, "hyenadna_species5", data)["model"]["max_len"] == 2002


def test_a_model_is_trained_and_measured(toy: Path) -> None:
    from zoo.train.bench_suites import section

    short = ("trainer.max_epochs=-1", "trainer.max_steps=3", "model.d_model=8", "++model.n_layer=1")
    todo = plan(toy, ["hyenadna_species5"], seeds=[4], overrides=short, keep=toy.parent / "kept")
    (row,) = bench.run(todo, lambda line: None)
    assert (row["suite"], row["set"], row["model"], row["seed"]) == ("toy", "toy", "hyenadna_species5", "4")
    assert -1 <= float(row["score"]) <= 1
    assert row["score"] == row["mcc"]
    assert 0 <= float(row["accuracy"]) <= 1
    assert row["steps"] == "3"
    assert int(row["parameters"]) > 500
    kept = toy.parent / "kept" / "toy" / "hyenadna_species5" / "seed4" / "artifact"
    assert (kept / "model.safetensors").is_file()
    probe = (*short, "+finetune.mode=probe")
    with pytest.raises(ConfigError, match="needs weights to start from"):
        bench.run_one(plan(toy, [], overrides=probe), ITEM, "hyenadna_species5", 4, {**section(SUITE, ITEM, toy)})
    rows = bench.run(plan(toy, ["hyenadna_species5"], seeds=[5], overrides=probe, init=str(kept)), lambda line: None)
    assert rows[-1]["model"] == "hyenadna_species5 from seed4"
    assert rows[-1]["steps"] == "3"
