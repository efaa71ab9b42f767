"""Suites of benchmarks in the layouts they are published in, on small copies and on the real files where they are."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoo import datamodules
from zoo.errors import ZooError
from zoo.tokenizers import build
from zoo.train import bench_suites
from zoo.train.bench_suites import METRICS, choose_sets, load_suite, section, suite_names

CHAR = build({"name": "char"})


def sequences(count: int, length: int = 30, seed: int = 0) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    return [("".join(draw.choice("ACGT") for _ in range(length)), i % 2) for i in range(count)]


def write_csv(path: Path, rows: list[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("sequence", "label"), *rows])


def sizes(found: dict[str, Any]) -> dict[str, int]:
    data = datamodules.build(found, CHAR)
    data.setup()
    return {name: len(source) for name, source in data.sources.items()}


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_is_whole(name: str) -> None:
    suite = load_suite(name)
    assert suite.layout in ("csv", "folders", "fasta", "catalogue")
    for item in suite.sets.values():
        assert item.metric in METRICS
        assert item.classes >= 2
        assert item.length > 0
        assert set(item.published) <= set(suite.sources), f"{item.name}: a published number without a source"
        assert all(0 < score <= 100 for score in item.published.values())


def test_suites_have_the_published_number_of_sets() -> None:
    counts = {name: len(load_suite(name).sets) for name in ("gue", "gb", "nt")}
    assert counts == {"gue": 28, "gb": 9, "nt": 18}
    assert load_suite("gue").sets["virus_covid"].metric == "f1"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ZooError, match="did you mean 'gue'"):
        load_suite("gua")
    with pytest.raises(ZooError, match="did you mean 'mouse_2'"):
        choose_sets(load_suite("gue"), ["mouse2"])


@pytest.mark.parametrize("place", ["mouse/0", "GUE/mouse/0", "mouse_0"])
def test_gue_layout(tmp_path: Path, place: str) -> None:
    rows = sequences(20)
    for split, part in (("train", rows[:12]), ("dev", rows[12:16]), ("test", rows[16:])):
        write_csv(tmp_path / place / f"{split}.csv", part)
    suite = load_suite("gue")
    assert sizes(section(suite, suite.sets["mouse_0"], tmp_path)) == {"train": 12, "val": 4, "test": 4}


def test_genomic_benchmarks_layout(tmp_path: Path) -> None:
    for i, (text, label) in enumerate(sequences(40)):
        folder = tmp_path / "human_enhancers_cohn" / ("test" if i >= 30 else "train") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(text.lower())
    suite = load_suite("genomic_benchmarks")
    found = section(suite, suite.sets["human_enhancers_cohn"], tmp_path)
    assert sizes(found) == {"train": 27, "val": 3, "test": 10}
    data = datamodules.build(found, CHAR)
    data.setup()
    assert data.classes == ("class0", "class1")
    assert data.sources["train"].texts[0].isupper()  # type: ignore[attr-defined]


def test_nucleotide_transformer_layout(tmp_path: Path) -> None:
    for split, rows in (("train", sequences(20)), ("test", sequences(6, seed=1))):
        file = tmp_path / "enhancers" / f"{split}.fna"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f">chr1_{i}|{label}\n{text}\n" for i, (text, label) in enumerate(rows)))
    suite = load_suite("nt")
    assert sizes(section(suite, suite.sets["enhancers"], tmp_path)) == {"train": 18, "val": 2, "test": 6}


@pytest.mark.parametrize(("suite_name", "set_name", "column"), [("nt", "H3", "sequence"), ("gb", "human_or", "seq")])
def test_parquet_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suite_name: str, set_name: str, column: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    suite = load_suite(suite_name)
    item = suite.sets["demo_human_or_worm" if set_name == "human_or" else set_name]
    asked: list[tuple[str, list[str]]] = []
    for split, count in (("train", 20), ("test", 6)):
        rows = sequences(count)
        columns = {column: [text for text, _ in rows] * 2, "label": [label for _, label in rows] * 2}
        if suite_name == "nt":
            columns["task"] = [item.name] * count + ["another"] * count
        (tmp_path / "hub").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(columns), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")

    def pulled(repo: str, patterns: list[str]) -> Path:
        asked.append((repo, patterns))
        return tmp_path / "hub"

    monkeypatch.setattr("zoo.hub.client.pull_dataset", pulled)
    found = section(suite, item, cache=tmp_path / "csv")
    many = 1 if suite_name == "nt" else 2
    assert sizes(found) == {"train": 18 * many, "val": 2 * many, "test": 6 * many}
    assert asked[0][0].endswith(("downstream_tasks", "human_or_worm"))
    assert "*.parquet" in asked[0][1]


def test_missing_folders_and_splits_are_named(tmp_path: Path) -> None:
    suite = load_suite("gue")
    item = suite.sets["mouse_0"]
    with pytest.raises(ZooError, match="not on the Hub"):
        section(suite, item)
    with pytest.raises(ZooError, match="does not exist"):
        section(suite, item, tmp_path / "nowhere")
    with pytest.raises(ZooError, match="holds no folder 'mouse/0'"):
        section(suite, item, tmp_path)
    write_csv(tmp_path / "mouse" / "0" / "train.csv", sequences(4))
    with pytest.raises(ZooError, match="no test split"):
        section(suite, item, tmp_path)


def test_a_data_set_that_cannot_be_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.hub.client.offline", lambda: True)
    monkeypatch.setattr("zoo.hub.cache.cache_root", lambda: tmp_path)
    suite = load_suite("nt")
    with pytest.raises(ZooError, match=r"hf download InstaDeepAI/\S+ --repo-type dataset"):
        section(suite, suite.sets["H3"])


def test_a_written_table_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "rows.csv"

    def broken() -> Any:
        yield ("a", 1)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        bench_suites.write_atomic(target, ("name", "value"), broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mouse_2", "mouse_3", "prom_core_tata", "prom_300_tata", "tf_3"])
def test_the_real_gue_files(shared: Path, name: str) -> None:
    suite = load_suite("gue")
    found = section(suite, suite.sets[name], shared / "data" / "gue")
    assert found["train"]["sha256"], "the catalogue's own entry, which knows the official files"
    count = sizes(found)
    assert count["train"] > 5 * count["test"] > 0
    data = datamodules.build(found, CHAR)
    data.setup()
    assert max(map(len, data.sources["train"].texts)) == suite.sets[name].length  # type: ignore[attr-defined]
    assert data.num_outputs == suite.sets[name].classes


def test_embedded_sets_are_those_of_the_catalogue(root: Path) -> None:
    suite = load_suite("embedded")
    for item in suite.sets.values():
        found = section(suite, item)
        assert found == yaml.safe_load((root / "datamodules" / f"{item.name}.yaml").read_text())
        assert len(found["classes"]) == item.classes
