"""Reads for language models: packing keeps every token once, segments say whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo.datamodules as datamodules
from zoo.datamodules.reads import ReadsData, pack
from zoo.errors import ConfigError, ZooError
from zoo.tokenizers.char import CharTokenizer, CharTokenizerConfig

TOKENIZER = CharTokenizer(CharTokenizerConfig(template="cls_sep", pad_side="right"))


def reads(count: int, low: int = 5, high: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("ACGT"), rng.integers(low, high))) for _ in range(count)]


def make(folder: Path, texts: list[str], **fields: Any) -> ReadsData:
    (folder / "r.fa").write_text("".join(f">r{i}\n{text}\n" for i, text in enumerate(texts)))
    section = {"name": "reads", "root": str(folder), "train": {"path": "r.fa"}, "length": 64, "batch_size": 4, **fields}
    data = datamodules.build(section, TOKENIZER, 3)
    assert isinstance(data, ReadsData)
    return data


def rows_of(data: ReadsData, split: str = "train") -> list[str]:
    out = []
    for batch in data.loader(split, train=False):  # type: ignore[arg-type]
        assert set(batch) == ({"ids", "valid", "segment", "index"} if data.config.pack else {"ids", "valid", "index"})
        for i in range(len(batch["ids"])):
            ids, valid = batch["ids"][i], batch["valid"][i]
            if not data.config.pack:
                parts = [ids[valid]]
            else:
                segment = batch["segment"][i]
                assert ((segment >= 0) == valid).all()
                assert (np.diff(segment[valid]) >= 0).all()
                parts = [ids[segment == s] for s in range(int(segment.max()) + 1)]
            for part in parts:
                assert part[0] == 0
                assert part[-1] == 1
                out.append(TOKENIZER.sequence(part.tolist()))
            assert (ids[~valid] == 4).all()
    return out


@pytest.mark.parametrize("packed", [True, False])
def test_every_read_once(tmp_path: Path, packed: bool) -> None:
    texts = reads(200)
    data = make(tmp_path, texts, pack=packed)
    assert sorted(rows_of(data)) == sorted(texts)
    source = data.sources["train"]
    if packed:
        assert len(source) < 100
        assert source.fill > 0.75  # type: ignore[attr-defined]
        assert next(iter(data.train_dataloader()))["ids"].shape == (4, 64)
    else:
        assert len(source) == 200
    assert data.task_kind == "lm"
    assert data.max_tokens == 64


def test_pack_never_overflows_or_loses() -> None:
    counts = np.random.default_rng(1).integers(1, 65, 500)
    rows = pack(counts, 64, np.random.default_rng(2).permutation(500))
    assert max(counts[row].sum() for row in rows) <= 64
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))


def test_longer_reads(tmp_path: Path) -> None:
    texts = [*reads(20), "ACGT" * 40, "T" * 62]
    with pytest.raises(ZooError, match=r"sequence 21 has 160 tokens, more than the 62 that data\.length=64"):
        make(tmp_path, texts).setup()
    assert sorted(rows_of(make(tmp_path, texts, longer="drop"))) == sorted([*texts[:20], texts[21]])
    long = "ACGT" * 40
    want = sorted([*texts[:20], texts[21], long[:62], long[62:124], long[124:]])
    assert sorted(rows_of(make(tmp_path, texts, longer="split"))) == want
    with pytest.raises(ZooError, match="every sequence"):
        make(tmp_path, ["A" * 100], longer="drop").setup()


def test_val_fraction_csv_and_upper(tmp_path: Path) -> None:
    texts = reads(50)
    (tmp_path / "r.csv").write_text("sequence\n" + "\n".join(text.lower() for text in texts) + "\n")
    data = make(tmp_path, texts, train={"path": "r.csv"}, upper=True, val_fraction=0.2)
    train, val = rows_of(data), rows_of(data, "val")
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train + val) == sorted(texts)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length must be at least 8"):
        make(tmp_path, ["A"], length=3)
    with pytest.raises(ZooError, match="holds no sequences"):
        make(tmp_path, ["", ""]).setup()
