"""What a biologist does with a genomic model, by the command."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo.hub.artifact as artifact
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.metagene import METAGENE, METAGENEConfig
from zoo.tokenizers import build
from zoo.tokenizers.bpe import train as train_bpe
from zoo.train.embed import embed

Zoo = Callable[..., tuple[int, str, str]]
SEQUENCES = {"one": "ACGTTGCAACGGTACC", "two": "GGCATCGATTACGGATCCATTAAC", "three": "TTGACA"}


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    file = tmp_path / "in.fa"
    file.write_text("".join(f">{name}\n{text}\n" for name, text in SEQUENCES.items()))
    return file


def table(text: str) -> list[dict[str, str]]:
    header, *rows = [line.split("\t") for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", ["letters", "kmers"])
def test_score_is_the_sum_over_tokens(zoo: Zoo, models: dict[str, Path], fasta: Path, name: str) -> None:
    status, out, err = zoo("score", models[name], "--fasta", fasta)
    assert status == 0
    tail = "A, C, G and T: 1, in 1 of 3 sequences (first in 'one')"  # of 16 letters, five 3-mers leave one
    assert tail in err if name == "kmers" else not err
    found = artifact.load(str(models[name]))
    per_token = table(zoo("score", models[name], "--fasta", fasta, "--per-token")[1])
    for row in table(out):
        text = SEQUENCES[row["name"]]
        ids = torch.from_numpy(found.tokenizer.encode(text))[None]
        nats = found.model.eval()(ids).detach()[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        spans = found.tokenizer.offsets(text)[1:]
        expected = float(nats[torch.from_numpy(spans[:, 1] > spans[:, 0])].sum())
        assert float(row["log_likelihood"]) == pytest.approx(expected, abs=1e-3)
        mine = [float(token["log_likelihood"]) for token in per_token if token["name"] == row["name"]]
        assert sum(mine) == pytest.approx(expected, abs=1e-3)
        assert float(row["per_base"]) == pytest.approx(expected / int(row["bases"]), abs=1e-4)


def test_pseudo_likelihood_hides_one_token_at_a_time(zoo: Zoo, models: dict[str, Path], fasta: Path) -> None:
    rows = table(zoo("score", models["masked"], "--fasta", fasta)[1])
    found = artifact.load(str(models["masked"]))
    text, total = SEQUENCES["three"], 0.0
    ids = torch.from_numpy(found.tokenizer.encode(text))[None]
    for i in range(len(text)):
        at = int(np.flatnonzero((found.tokenizer.offsets(text) == (i, i + 1)).all(1))[0])
        hidden = ids.clone()
        hidden[0, at] = found.tokenizer.special["mask"]
        total += float(found.model.eval()(hidden).detach()[0, at].log_softmax(-1)[ids[0, at]])
    assert float(rows[2]["pseudo_log_likelihood"]) == pytest.approx(total, abs=1e-3)
    assert rows[2]["bases"] == "6"
    predicted = table(zoo("predict", models["masked"], "--fasta", fasta)[1])
    assert float(predicted[2]["pseudo_log_likelihood"]) == pytest.approx(total / 6, abs=1e-3)
    assert [row["bases"] for row in predicted] == [str(len(text)) for text in SEQUENCES.values()]


def test_hiding_several_at_once(zoo: Zoo, models: dict[str, Path], fasta: Path) -> None:
    """Every fourth letter hidden at once gives those letters' likelihoods without their neighbours of the same turn."""
    rows = table(zoo("score", models["masked"], "--fasta", fasta, "--mask-every", "4", "--per-token")[1])
    found = artifact.load(str(models["masked"]))
    text = SEQUENCES["one"]
    ids = torch.from_numpy(found.tokenizer.encode(text))[None]
    expected = torch.zeros(ids.shape[1])
    for turn in range(4):
        hidden = ids.clone()
        hidden[:, turn::4] = found.tokenizer.special["mask"]
        law = found.model.eval()(hidden).detach()[0].log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
        expected[turn::4] = law[turn::4]
    mine = [float(row["pseudo_log_likelihood"]) for row in rows if row["name"] == "one"]
    assert mine == pytest.approx(expected[: len(text)].tolist(), abs=1e-3)
    # as many turns as there are tokens hide one at a time
    exact = zoo("score", models["masked"], "--fasta", fasta)[1]
    assert zoo("score", models["masked"], "--fasta", fasta, "--mask-every", "99")[1] == exact


@pytest.mark.parametrize("name", ["letters", "kmers", "masked"])
@pytest.mark.parametrize("pool", ["mean", "last", "first", "base"])
def test_embed_ignores_the_batch(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path, name: str, pool: str
) -> None:
    """A sequence alone gives the same vectors as beside longer ones."""
    out = tmp_path / "v.npz"
    assert zoo("embed", models[name], "--fasta", fasta, "--pool", pool, "--out", out)[0] == 0
    found, stored = artifact.load(str(models[name])), np.load(out)
    assert stored["names"].tolist() == list(SEQUENCES)
    parts = np.split(stored["embeddings"], np.cumsum(stored["lengths"])[:-1]) if pool == "base" else None
    for i, text in enumerate(SEQUENCES.values()):
        ids = torch.from_numpy(found.tokenizer.encode(text))[None]
        states = found.model.eval().forward_features(ids)[0][0].detach().numpy()
        if parts is not None:
            assert len(parts[i]) == len(text)
            for (start, end), state in zip(found.tokenizer.offsets(text), states, strict=True):
                assert np.allclose(parts[i][start:end], state, atol=1e-4)
            continue
        expected = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pool]
        assert np.allclose(stored["embeddings"][i], expected, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "base"])
def test_parquet_holds_what_npz_holds(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path, pool: str
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"v.{suffix}"
        assert zoo("embed", models["kmers"], "--fasta", fasta, "--pool", pool, "--out", out)[0] == 0
    found, stored = parquet.read_table(tmp_path / "v.parquet"), np.load(tmp_path / "v.npz")
    vectors = np.array(found["embedding"].to_pylist(), np.float32)
    assert np.array_equal(vectors, stored["embeddings"])
    assert found.schema.metadata[b"pool"] == pool.encode()
    names = found["name"].to_pylist()
    if pool == "mean":
        assert names == stored["names"].tolist()
        return
    assert names == [name for name, text in SEQUENCES.items() for _ in text]
    assert "".join(found["base"].to_pylist()) == "".join(SEQUENCES.values())
    assert found["position"].to_pylist() == [i for text in SEQUENCES.values() for i in range(len(text))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa", "v.npz", "v.parquet"]


def test_parquet_without_its_package(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = zoo("embed", models["letters"], "--fasta", fasta, "--out", tmp_path / "v.parquet")
    assert status == 2
    assert "pip install 'seqzoo[parquet]'" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "v.parquet").exists()


def test_the_class_token(models: dict[str, Path]) -> None:
    """`cls` is the state of [CLS], which a tokenizer must put there."""
    found = artifact.load(str(models["masked"]))
    found.tokenizer = build({"name": "char", "template": "cls_sep"})
    ids = torch.from_numpy(found.tokenizer.encode("ACGT"))[None]
    expected = found.model.eval().forward_features(ids)[0][0, 0].detach().numpy()
    assert int(ids[0, 0]) == found.tokenizer.special["cls"]
    pairs = [("a", "ACGT"), ("b", "ACGTACGT")]
    assert np.allclose(next(iter(embed(found, pairs, "cls")))[1], expected, atol=1e-4)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models over byte pairs: one that reads left to right, one of masked tokens."""
    place = tmp_path_factory.mktemp("words")
    draw = random.Random(0)
    train_bpe(["".join(draw.choices("ACGT", k=900))], 40, place / "tokenizer.json")
    tokenizer = build({"name": "bpe", "file": str(place / "tokenizer.json")})
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": tokenizer.vocab_size}
    made = {"causal": METAGENE(METAGENEConfig(**sizes)), "masked": DNABERT2(DNABERT2Config(**sizes))}
    for name, model in made.items():
        artifact.save(model, place / name, tokenizer=tokenizer)
    return {name: place / name for name in made}


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_letters_without_a_token(zoo: Zoo, words: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Byte pairs read N and lower case as unknown: they are left out of the sums, and it is said how many."""
    file = tmp_path / "n.fa"
    file.write_text(">clean\nACGTTGCAACGGTACC\n>mixed\nACGTTGCANNacGTACCGGT\n>nothing\nNNNNNN\n")
    status, out, err = zoo("score", words[name], "--fasta", file)
    assert status == 0
    assert "A, C, G and T: 10, in 2 of 3 sequences (first in 'mixed')" in err
    rows = {row["name"]: row for row in table(out)}
    kind = "" if name == "causal" else "pseudo_"
    assert rows["nothing"]["bases"] == "0"
    assert rows["nothing"][f"{kind}per_base"] == "nan"
    tokens = table(zoo("score", words[name], "--fasta", file, "--per-token")[1])
    sums = {key: sum(float(t[f"{kind}log_likelihood"]) for t in tokens if t["name"] == key) for key in rows}
    read = {key: sum(int(t["end"]) - int(t["start"]) for t in tokens if t["name"] == key) for key in rows}
    first = len(artifact.load(str(words[name])).tokenizer.prefix) == 0  # a causal model has nothing before it
    for key, letters in (("clean", 16), ("mixed", 16)):
        assert sums[key] == pytest.approx(float(rows[key][f"{kind}log_likelihood"]), abs=1e-3)
        assert read[key] == int(rows[key]["bases"])
        assert read[key] == letters if not first else read[key] < letters
    status, out, err = zoo("score", words[name], "--fasta", file, "--unknown", "error")
    assert (status, out) == (2, "")
    assert "sequence 'mixed': the bpe tokenizer reads 4 of its letters" in err


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_variants_beside_unknown_letters(zoo: Zoo, words: dict[str, Path], tmp_path: Path, name: str) -> None:
    draw = random.Random(1)
    genome = "".join(draw.choices("ACGT", k=200))
    genome = genome[:90] + "NN" + genome[92:]
    (tmp_path / "g.fa").write_text(f">chr1\n{genome}\n")
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for place in (85, 180):  # windows of 40 bases: the first holds the Ns
        ref = genome[place - 1]
        lines.append(f"chr1\t{place}\t.\t{ref}\t{'ACGT'[('ACGT'.index(ref) + 1) % 4]}\t.\t.\t.")
    (tmp_path / "in.vcf").write_text("\n".join(lines) + "\n")
    files = ("--vcf", tmp_path / "in.vcf", "--fasta", tmp_path / "g.fa", "--window", "40")
    status, out, err = zoo("variants", words[name], *files)
    assert status == 0
    assert err.startswith("1 alleles were scored in windows with N")
    assert all(row["score"] and not row["note"] for row in table(out))
    status, out, err = zoo("variants", words[name], *files, "--unknown", "skip")
    assert status == 0
    assert "no score for 1 alleles: 1 unknown_in_window" in err
    assert [row["note"] for row in table(out)] == ["unknown_in_window", ""]
    assert [bool(row["score"]) for row in table(out)] == [False, True]


def test_a_model_of_pairs_is_not_asked_for_one_sequence(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path
) -> None:
    found = artifact.load(str(models["classes"]))
    recipe = {"data": {"sequence2": "partner"}}
    artifact.save(found.model, tmp_path / "pairs", tokenizer=found.tokenizer, recipe=recipe, classes=["no", "yes"])
    status, _, err = zoo("embed", tmp_path / "pairs", "--fasta", fasta, "--out", tmp_path / "v.npz")
    assert status == 2
    assert "was trained on pairs of sequences (data.sequence2=partner)" in err
    assert not (tmp_path / "v.npz").exists()


@pytest.mark.parametrize("side", ["left", "right", "error"])
def test_predict_cuts_as_training_did(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path, side: str
) -> None:
    found = artifact.load(str(models["classes"]))
    recipe = {"data": {"max_len": 10, "truncate": side, "add_special": False}}
    place = tmp_path / "cut"
    artifact.save(found.model, place, tokenizer=found.tokenizer, recipe=recipe, classes=["no", "yes"])
    status, out, err = zoo("predict", place, "--fasta", fasta)
    if side == "error":
        assert status == 2
        assert "sequence 'two' has 24 tokens, more than the data.max_len=10" in err
        return
    assert (status, err) == (0, "")
    short = tmp_path / "short.fa"
    cut = {name: text[-10:] if side == "left" else text[:10] for name, text in SEQUENCES.items()}
    short.write_text("".join(f">{name}\n{text}\n" for name, text in cut.items()))
    assert out == zoo("predict", place, "--fasta", short)[1]
    labels = [found.model.eval()(torch.from_numpy(found.tokenizer.encode(text, False))[None]) for text in cut.values()]
    expected = [float(one.detach()[0].softmax(-1)[1]) for one in labels]
    assert [float(row["p_yes"]) for row in table(out)] == pytest.approx(expected, abs=1e-3)


def test_sentences(zoo: Zoo, models: dict[str, Path], fasta: Path, trained: Path, tmp_path: Path) -> None:
    for arguments, words in [
        (["embed", models["letters"], "--fasta", fasta, "--out", "v.txt"], ".npz"),
        (["embed", models["letters"], "--fasta", fasta, "--out", "nowhere/v.npz"], "nowhere"),
        (["embed", models["letters"], "--fasta", fasta, "--out", "v.npz", "--pool", "max"], "max"),
        (["embed", models["letters"], "--fasta", fasta, "--out", "v.npz", "--pool", "cls"], "no [CLS] token"),
        (["score", trained / "artifact", "--fasta", fasta], "language model"),
        (["score", models["letters"], "--fasta", tmp_path / "no.fa"], "does not exist"),
        (["score", models["letters"], "--fasta", fasta, "--batch-size", "0"], "at least 1"),
        (["score", models["letters"], "--fasta", fasta, "--mask-every", "4"], "reads from left to right"),
        (["score", models["masked"], "--fasta", fasta, "--mask-every", "1"], "at least 2"),
    ]:
        status, _, err = zoo(*arguments)
        assert status == 2, err
        assert words in err
        assert err.count("\n") == 1
