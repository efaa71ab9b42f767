"""The page of benchmark results, and the Markov models that the language model of E. coli is measured against."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from zoo.train.bench import read_results


def load(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    found = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_page_is_the_one_the_results_give(root: Path) -> None:
    done = subprocess.run([sys.executable, str(root / "benchmarks" / "bench_data_page.py"), "--check"])
    assert done.returncode == 0, "run python benchmarks/bench_data_page.py"


def test_every_result_carries_its_floors(root: Path) -> None:
    for name in ("embedded", "gue"):
        rows = read_results(root / "benchmarks" / "results" / "bench_data" / f"{name}.csv")
        assert rows
        for item in {row["set"] for row in rows}:
            models = {row["model"] for row in rows if row["set"] == item}
            assert "lr" in models, f"{name}/{item}"


def test_markov_models_find_the_entropy_of_a_chain(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(root, "ecoli_pretraining", monkeypatch)
    random = np.random.default_rng(0)
    # the next base repeats the one three before it with probability 0.7, else it is any of the four
    bases = random.integers(0, 4, 60_000)
    copied = random.random(len(bases)) < 0.7
    for i in range(3, len(bases)):
        if copied[i]:
            bases[i] = bases[i - 3]
    bits = script.markov(bases[:50_000], bases[50_000:], False)
    same, other = 0.7 + 0.3 / 4, 0.3 / 4
    entropy = -(same * np.log2(same) + 3 * other * np.log2(other))
    assert all(abs(bits[order] - 2) < 0.01 for order in (0, 1, 2)), "shorter contexts know nothing"
    assert abs(bits[3] - entropy) < 0.02
    assert bits[8] > bits[3], "long contexts are too rare to be better"
    assert script.words(np.array([0, 1, 2, 3]), 2).tolist() == [1, 6, 11]


def test_both_strands_of_a_palindrome_count_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(root, "ecoli_pretraining", monkeypatch)
    half = np.random.default_rng(1).integers(0, 4, 2000)
    palindrome = np.concatenate([half, 3 - half[::-1]])
    monkeypatch.setattr(script, "PRIOR", 1e-9)
    one, both = (script.markov(palindrome, palindrome, strands) for strands in (False, True))
    np.testing.assert_allclose(one[:4], both[:4], atol=1e-6)
