"""Every way to fine-tune, from a pretrained artifact to an artifact that evaluates and predicts as the run did."""

from __future__ import annotations

import csv
import json
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
from zoo.train.recipe import validate
from zoo.train.run import RunResult, train

MODEL = {"name": "generator", "d_model": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 24}
MODEL |= {"vocab_size": 69, "max_len": 64}
KMER = {"name": "kmer", "k": 3, "specials": "<oov> <s> </s> <pad> <mask>", "align": "left", "tail": "pad"}
TRAINER = {"max_steps": 12, "val_every": 4, "checkpoint_every": 4, "accelerator": "cpu", "threads": 1}


def turn(text: str) -> str:
    return text.translate(str.maketrans("ACGT", "TGCA"))[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Genome, classes (is the sequence rich in G and C), numbers, labels of bases (G or not), pairs."""
    place, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (place / "genome.fa").write_text(">one\n" + "".join(draw.choices("ACGT", k=6000)) + "\n")
    for split, rows in (("train", 64), ("val", 24), ("test", 24)):
        with (place / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["sequence", "other", "label", "gc", "at_rich", "bases"])
            for row in range(rows):
                weights = [1, 3, 3, 1] if row % 2 else [3, 1, 1, 3]
                text, other = ("".join(draw.choices("ACGT", weights=weights, k=30)) for _ in range(2))
                gc = sum(letter in "GC" for letter in text) / 30
                marks = "".join("g" if letter == "G" else "x" for letter in text)
                writer.writerow([text, other, row % 2, gc, 1 - row % 2, marks])
    return place


def recipe(folder: Path, **changes: Any) -> Any:
    """A validated recipe of a classifier; `section__key=value` changes one field."""
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {**MODEL, "head": {"kind": "sequence", "num_outputs": 2, "pooling": "mean"}},
        "tokenizer": KMER,
        "data": {
            "name": "labelled",
            "root": str(folder),
            **{split: {"path": f"{split}.csv"} for split in ("train", "val", "test")},
            "batch_size": 16,
        },
        "task": {"name": "classify", "optim": {"lr": 0.01}},
        "trainer": {**TRAINER, "monitor": "val/loss"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        at = data
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    return validate(data)


@pytest.fixture(scope="module")
def pretrained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    genome = {"name": "genome", "root": str(folder), "files": [{"path": "genome.fa"}], "length": 48, "batch_size": 8}
    genome |= {"warmup": [{"length": 12, "batches": 2}, {"length": 24, "batches": 2}]}
    data = {
        "name": "start",
        "model": {**MODEL, "head": {"kind": "lm", "tied": False}},
        "tokenizer": KMER,
        "data": genome,
        "task": {"name": "causal_lm", "objective": "per_base", "z_loss": 1e-4, "optim": {"lr": 0.01}},
        "trainer": TRAINER,
    }
    return train(validate(data), tmp_path_factory.mktemp("runs") / "start")


def check(result: RunResult, section: dict[str, Any]) -> dict[str, float]:
    """The artifact, loaded again, measures what the run measured; returns that."""
    got = evaluate(str(result.artifact), section, "test")
    for name, value in got.items():
        assert value == pytest.approx(result.metrics[f"test/{name}"], rel=1e-4, abs=1e-5), name
    return got


def test_pretraining_per_base_with_warm_up(pretrained: RunResult) -> None:
    # 2 bits a base is chance, 1.386 nats
    assert 0.8 < pretrained.metrics["val/loss"] < 1.6
    assert 1.8 < pretrained.metrics["val/bits_per_base"] < 2.5


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize("tokenizer", ["kmer", "char"])
def test_packed_pretraining(folder: Path, tmp_path: Path, task: str, tokenizer: str) -> None:
    """Packed reads train every family that can keep documents apart, and stop and go on as one run."""
    if task == "masked_lm":
        model = {"name": "dnabert2", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 69}
    else:
        model = {**MODEL, "head": {"kind": "lm", "tied": False}}
    reads = {"name": "reads", "root": str(folder), "train": {"path": "train.csv"}, "val": {"path": "val.csv"}}
    section: dict[str, Any] = {"name": task, "optim": {"lr": 0.01}}
    if task == "masked_lm":
        section["whole_kmer"] = 3 if tokenizer == "char" else 1
    data = {
        "name": "packed",
        "model": model,
        "tokenizer": KMER if tokenizer == "kmer" else {"name": "char"},
        "data": {**reads, "length": 48, "batch_size": 4},
        "task": section,
        "trainer": TRAINER,
    }
    whole = train(validate(data), tmp_path / "whole")
    again = stop_and_resume(data, tmp_path / "again")
    assert again.metrics == whole.metrics
    assert checkpoint_io.sha256_file(again.artifact / "model.safetensors") == checkpoint_io.sha256_file(
        whole.artifact / "model.safetensors"
    )


def stop_and_resume(data: Any, out: Path) -> RunResult:
    """A run of which the checkpoints after step 4 are lost, continued."""
    recipe = validate(data) if isinstance(data, dict) else data
    train(recipe, out)
    for path in checkpoint_io.checkpoints(out / "checkpoints"):
        if not path.name.endswith("000000008.ckpt"):
            path.unlink()
    return train(recipe, out, resume=True)


def test_full_fine_tuning_with_layer_decay(folder: Path, pretrained: RunResult, tmp_path: Path) -> None:
    options = {"init": str(pretrained.artifact), "task__optim": {"lr": 0.01, "layer_decay": 0.5}}
    whole = train(recipe(folder, **options), tmp_path / "run")
    check(whole, recipe(folder).data)
    payload = checkpoint_io.load(checkpoint_io.checkpoints(whole.dir / "checkpoints")[-1])
    rates = sorted({group["initial_lr"] for group in payload["optimizer_states"][0]["param_groups"]})
    assert rates == pytest.approx([0.00125, 0.0025, 0.005, 0.01])


def test_linear_probe_leaves_the_backbone_as_it_was(folder: Path, pretrained: RunResult, tmp_path: Path) -> None:
    options = {"init": str(pretrained.artifact), "finetune": {"mode": "probe"}}
    result = train(recipe(folder, **options), tmp_path / "run")
    check(result, recipe(folder).data)
    before, after = (artifact.load(str(r.artifact)).model.state_dict() for r in (pretrained, result))
    for name, value in after.items():
        assert name.startswith("head.") or torch.equal(value, before[name])
    described = dry_run(recipe(folder, **options))
    assert described.trained == 2 * 16 + 2 < described.parameters


def test_lora_run_its_adapter_and_its_continuation(folder: Path, pretrained: RunResult, tmp_path: Path) -> None:
    lora = {"mode": "lora", "lora": {"rank": 2, "dropout": 0.1}}
    optim = {"lr": 0.02, "layer_decay": 0.8}
    settings = recipe(folder, init=str(pretrained.artifact), finetune=lora, task__optim=optim)
    result = train(settings, tmp_path / "run")
    check(result, recipe(folder).data)
    whole, adapter = artifact.load(result.artifact), artifact.load(result.dir / "adapter")
    assert whole.model.state_dict().keys() == adapter.model.state_dict().keys()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(adapter.model.state_dict()[name], value)
    rows = [next(iter(predict(found, [("a", "ACGTTGCATGCA")])))["p_1"] for found in (whole, adapter)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-6)
    evaluate(str(result.dir / "adapter"), recipe(folder).data, "test")
    assert json.loads((result.dir / "adapter" / "adapter_config.json").read_text())["r"] == 2
    again = stop_and_resume(settings, tmp_path / "again")
    assert again.metrics == result.metrics
    for name in ("artifact/model.safetensors", "adapter/adapter_model.safetensors"):
        assert checkpoint_io.sha256_file(again.dir / name) == checkpoint_io.sha256_file(result.dir / name)


@pytest.mark.parametrize("policy", ["augment", "average", "conjoin"])
def test_strands(folder: Path, tmp_path: Path, policy: str) -> None:
    result = train(recipe(folder, task__rc=policy), tmp_path / "run")
    check(result, recipe(folder).data)
    text = "ACGTTGCATGCAACCGTAGAGTAATGGATT"
    found = artifact.load(result.artifact)
    assert found.recipe["data"]["rc_augment"] is (policy != "conjoin")
    one, other = (next(iter(predict(found, [("a", strand)])))["p_1"] for strand in (text, turn(text)))
    assert (one == pytest.approx(other, abs=1e-6)) is (policy != "augment")


@pytest.mark.parametrize("slots", [1, 3])
def test_labels_of_single_bases(folder: Path, tmp_path: Path, slots: int) -> None:
    """Only a head with a slot for each base of a k-mer can say which of its bases is a G."""
    data = {**recipe(folder).data, "label": "bases", "task": "token", "per_base": True}
    head = {"kind": "token", "num_outputs": 2, "slots": slots}
    options = {"model__head": head, "data": data, "task__rc": "conjoin", "trainer__max_steps": 60}
    result = train(recipe(folder, **options, trainer__val_every=20), tmp_path / "run")
    got = check(result, data)
    assert got["loss"] < 0.5 if slots == 3 else got["loss"] > 0.4
    text = "ACGTTGCATGCAACCGTAGAGTAATGGATTA"  # the last base has no partner in the other strand's grid of k-mers
    rows = {turned: list(predict(str(result.artifact), [("a", s)])) for turned, s in ((0, text), (1, turn(text)))}
    assert [row["start"] for row in rows[0]] == list(range(31))
    forward, backward = ([row["p_g"] for row in rows[i]] for i in (0, 1))
    assert forward == pytest.approx(backward[::-1], abs=1e-5)  # one answer for both strands


@pytest.mark.parametrize("mode", ["full", "probe", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_classifiers_from_a_masked_language_model(folder: Path, tmp_path: Path, mode: str, precision: str) -> None:
    """An encoder's head has more parts than its output layer: the language model's give way, a pooler is kept."""
    sizes = {"name": "dnabert2", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 69}
    reads = {"name": "reads", "root": str(folder), "train": {"path": "train.csv"}, "length": 48, "batch_size": 4}
    data = {"name": "mlm", "model": sizes, "tokenizer": KMER, "data": reads, "task": {"name": "masked_lm"}}
    start = train(validate({**data, "trainer": {**TRAINER, "max_steps": 2}}), tmp_path / "start")
    options = {"finetune": {"mode": mode}, "trainer__precision": precision, "tokenizer": {**KMER, "bos": True}}
    model = {**sizes, "head": {"kind": "sequence", "num_outputs": 2, "pooling": "first"}}
    result = train(recipe(folder, model=model, init=str(start.artifact), **options), tmp_path / "run")
    before, after = (artifact.load(r.artifact).model.state_dict() for r in (start, result))
    same = torch.equal(before["backbone.layers.0.mlp.down.weight"], after["backbone.layers.0.mlp.down.weight"])
    assert same is (mode != "full")
    token = {**model, "head": {"kind": "token", "num_outputs": 2}}
    labels = {**recipe(folder).data, "label": "bases", "task": "token"}
    dry_run(recipe(folder, model=token, init=str(start.artifact), data=labels))
    model["head"] = {**model["head"], "num_outputs": 1}
    numbers = {**recipe(folder).data, "label": "gc", "task": "regression"}
    again = recipe(folder, model=model, init=str(result.artifact), data=numbers, task__kind="regression")
    pooler = assemble.assemble(again).model.pooler
    assert torch.equal(pooler.weight, after["pooler.weight"])


def test_kinds_of_labels_and_pairs(folder: Path, pretrained: RunResult, tmp_path: Path) -> None:
    multilabel = {**recipe(folder).data, "label": ["label", "at_rich"], "task": "multilabel"}
    regression = {**recipe(folder).data, "label": "gc", "task": "regression", "sequence2": "other"}
    for kind, data, outputs in (("multilabel", multilabel, 2), ("regression", regression, 1)):
        head = {"kind": "sequence", "num_outputs": outputs, "pooling": "mean"}
        options = {"model__head": head, "data": data, "task__kind": kind, "task__rc": "average"}
        result = train(recipe(folder, **options, init=str(pretrained.artifact)), tmp_path / kind)
        check(result, data)
    with (folder / "test.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    both = [(str(i), (row["sequence"], row["other"])) for i, row in enumerate(rows)]
    mine = torch.tensor([row["gc"] for row in predict(result.artifact, both)])
    error = (mine - torch.tensor([float(row["gc"]) for row in rows])).square().mean()
    assert float(error) == pytest.approx(result.metrics["test/loss"], rel=1e-3)
    with pytest.raises(ZooError, match="trained on pairs of sequences"):
        list(predict(result.artifact, [("a", "ACGTAC")]))
    with pytest.raises(ZooError, match="reads single sequences, but 'a' is a pair"):
        list(predict(tmp_path / "multilabel" / "artifact", [("a", ("ACGTAC", "ACG"))]))


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'finetune\.lora\.rnak' \(did you mean 'rank'\?\)"):
        recipe(folder, finetune={"mode": "lora", "lora": {"rnak": 2}}, init="somewhere")
    with pytest.raises(ConfigError, match=r"finetune\.mode"):
        recipe(folder, finetune={"mode": "lroa"})
    with pytest.raises(ConfigError, match="needs weights to start from"):
        recipe(folder, finetune={"mode": "lora"})
    data = {**recipe(folder).data, "label": "bases", "task": "token"}
    with pytest.raises(ZooError, match=r"set model\.head\.kind=token"):
        dry_run(recipe(folder, data=data))
    reads = {"name": "reads", "root": str(folder), "train": {"path": "train.csv"}, "length": 48}
    lm = {**MODEL, "head": {"kind": "lm", "tied": False}}
    task = {"name": "causal_lm", "objective": "per_base"}
    char = recipe(folder, data=reads, task=task, tokenizer={"name": "char"}, model=lm, trainer__monitor=None)
    with pytest.raises(ZooError, match=r"task\.objective=per_base needs a k-mer tokenizer"):
        dry_run(char)
    genome = recipe(folder, data=reads, task={"name": "causal_lm"}, model=lm, trainer__monitor=None)
    with pytest.raises(ConfigError, match=r"task\.rc=conjoin is for labelled sequences"):
        assemble.with_strands(genome.data, {"rc": "conjoin"})
