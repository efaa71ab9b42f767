"""Labelled sequences: every kind of label and file, and one clear sentence for each mistake."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo.datamodules as datamodules
import zoo.tokenizers as tokenizers
from zoo.datamodules.augment import reverse_complement
from zoo.datamodules.labelled import LabelledData
from zoo.errors import ConfigError, ZooError
from zoo.tokenizers.char import CharTokenizer
from zoo.tokenizers.kmer import KmerTokenizer, KmerTokenizerConfig

TOKENIZER = CharTokenizer()


def make(folder: Path, text: str = "", name: str = "train.csv", seed: int = 0, **fields: Any) -> LabelledData:
    if text:
        (folder / name).write_text(text)
    section = {"name": "labelled", "root": str(folder), "train": {"path": name}, "batch_size": 2, **fields}
    data = datamodules.build(section, TOKENIZER, seed)
    assert isinstance(data, LabelledData)
    return data


def rows(data: LabelledData, split: str = "train") -> dict[int, tuple[str, Any]]:
    """index -> (sequence, label) of one pass over a split."""
    out = {}
    for batch in data.loader(split, train=False):
        for ids, valid, label, index in zip(batch["ids"], batch["valid"], batch["labels"], batch["index"], strict=True):
            out[int(index)] = (TOKENIZER.sequence(ids[valid].tolist()), label.tolist())
    return out


TABLE = "sequence,label\nACGT,0\nGGGTTT,1\nCC,2\nTTAA,1\n"


def test_classes_by_number(tmp_path: Path) -> None:
    data = make(tmp_path, TABLE)
    assert rows(data) == {0: ("ACGT", 0), 1: ("GGGTTT", 1), 2: ("CC", 2), 3: ("TTAA", 1)}
    assert (data.task_kind, data.num_outputs, data.classes) == ("multiclass", 3, ("0", "1", "2"))
    assert data.class_counts is not None
    assert data.class_counts.tolist() == [1, 2, 1]
    assert data.max_tokens == 7
    batch = next(iter(data.train_dataloader()))
    assert {k: v.dtype for k, v in batch.items()} == {
        "ids": torch.int64,
        "valid": torch.bool,
        "labels": torch.int64,
        "index": torch.int64,
    }


def test_classes_by_name(tmp_path: Path) -> None:
    text = "name\tseq\tkind\nx\tACGT\tdonor\ny\tGG\tother\n"
    data = make(tmp_path, text, "train.tsv", sequence="seq", label="kind")
    assert data.classes == ("donor", "other")
    assert rows(data) == {0: ("ACGT", 0), 1: ("GG", 1)}
    given = make(tmp_path, text, "train.tsv", sequence="seq", label="kind", classes=["other", "x", "donor"])
    assert [label for _, label in rows(given).values()] in ([2, 0], [0, 2])
    assert given.num_outputs == 3


def test_regression_and_multilabel(tmp_path: Path) -> None:
    text = "sequence,a,b\nACGT,0.5,1\nGG,-2,0\n"
    one = make(tmp_path, text, task="regression", label="a")
    assert rows(one) == {0: ("ACGT", 0.5), 1: ("GG", -2.0)}
    assert one.num_outputs == 1
    assert one.class_counts is None
    two = make(tmp_path, text, task="regression", label=["a", "b"])
    assert rows(two)[1] == ("GG", [-2.0, 0.0])
    assert (two.num_outputs, two.classes) == (2, ("a", "b"))
    many = make(tmp_path, "sequence,x,y\nA,0,1\nC,1,1\n", task="multilabel", label=["x", "y"])
    assert rows(many) == {0: ("A", [0.0, 1.0]), 1: ("C", [1.0, 1.0])}
    assert many.class_counts is not None
    assert many.class_counts.tolist() == [1, 2]
    assert next(iter(many.train_dataloader()))["labels"].dtype == torch.float32
    named = make(tmp_path, "sequence,label\nA,q;p\nC,\n", task="multilabel", classes=["p", "q", "r"])
    assert rows(named) == {0: ("A", [1.0, 1.0, 0.0]), 1: ("C", [0.0, 0.0, 0.0])}


def test_fasta_with_labels_and_gzip(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.fa.gz", "wt") as out:
        out.write(">chr1:1-8|1\nACGT\nACGT\n>b|0\nGG\n")
    assert rows(make(tmp_path, name="train.fa.gz")) == {0: ("ACGTACGT", 1), 1: ("GG", 0)}
    with pytest.raises(ZooError, match=r"record 'b' has no label \(expected '>name\|label'\)"):
        make(tmp_path, ">a|1\nAC\n>b\nGG\n", "x.fa").setup()


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name, text in {"positive/0": "ACGT", "positive/7": "GG\nTT\n", "negative/1": "CC"}.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / f"{name}.txt").write_text(text)
    data = make(tmp_path, name="train", format="folder")
    assert data.classes == ("negative", "positive")
    assert sorted(rows(data).values()) == [("ACGT", 1), ("CC", 0), ("GGTT", 1)]
    before = data.files()[0]["sha256"]
    (tmp_path / "train" / "negative" / "2.txt").write_text("A")
    assert data.files()[0]["sha256"] != before
    with pytest.raises(ZooError, match="is a folder, expected a file"):
        make(tmp_path, name="train").setup()
    with pytest.raises(ZooError, match="is a file, expected a folder"):
        make(tmp_path, TABLE, format="folder").setup()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ZooError, match="holds no files of the layout"):
        make(tmp_path, name="nothing", format="folder").setup()


def test_pairs(tmp_path: Path) -> None:
    data = make(tmp_path, "sequence,mate,label\nACGT,TT,0\nGG,CCC,1\n", sequence2="mate")
    batch = next(iter(data.loader("train", train=False)))
    assert batch["ids"][0][batch["valid"][0]].tolist() == TOKENIZER.encode_pair("ACGT", "TT")[0].tolist()


def test_one_label_a_base(tmp_path: Path) -> None:
    text = "sequence,label\nACGTACGT,00110022\nGGGAAA,.01111\nACGTACGTAC,0000000000\n"
    data = make(tmp_path, text, task="token", batch_size=3)
    assert (data.task_kind, data.num_outputs, data.classes) == ("token", 3, ("0", "1", "2"))
    assert data.class_counts is not None
    assert data.class_counts.tolist() == [15, 6, 2]
    batch = next(iter(data.loader("train", train=False)))
    assert batch["labels"].shape == batch["ids"].shape
    assert batch["labels"][0].tolist() == [-100, -100, 0, 0, 1, 1, 0, 0, 2, 2, -100]
    assert batch["labels"][1].tolist() == [-100] * 5 + [0, 1, 1, 1, 1, -100]
    data = make(tmp_path, text, task="token", batch_size=3)
    data.tokenizer = KmerTokenizer(KmerTokenizerConfig(k=2, align="left", end="eos"))
    batch = next(iter(data.loader("train", train=False)))
    assert batch["labels"][0].tolist() == [-100, 0, 1, 0, 2, -100, -100]
    assert batch["labels"][1].tolist() == [-100, 0, 1, 1, -100, -100, -100]
    for side, want in (("right", [0, 0, 1, -100]), ("left", [0, 2, 2, -100])):
        cut = make(tmp_path, text, task="token", batch_size=3, max_len=4, truncate=side)
        assert next(iter(cut.loader("train", train=False)))["labels"][0].tolist() == want
    turned = make(tmp_path, text, task="token", batch_size=3, rc_augment=True).train_dataloader()
    seen = set()
    for _ in range(8):
        batch = next(iter(turned))
        row = batch["index"].tolist().index(0)
        real = batch["valid"][row]
        assert TOKENIZER.sequence(batch["ids"][row][real].tolist()) == "ACGTACGT"  # its own reverse complement
        seen.add(tuple(batch["labels"][row][real].tolist()[:-1]))
    assert seen == {(0, 0, 1, 1, 0, 0, 2, 2), (2, 2, 0, 0, 1, 1, 0, 0)}


def test_val_fraction_folds_and_limit(tmp_path: Path) -> None:
    text = "sequence,label\n" + "".join(f"{'ACGT' * (i + 1)},{i % 2}\n" for i in range(20))
    data = make(tmp_path, text, val_fraction=0.2)
    parts = {split: {s for s, _ in rows(data, split).values()} for split in ("train", "val")}
    assert (len(parts["train"]), len(parts["val"])) == (16, 4)
    assert not parts["train"] & parts["val"]
    seen: list[str] = []
    for fold in range(5):
        data = make(tmp_path, text, folds=5, fold=fold, seed=fold)
        parts = {split: {s for s, _ in rows(data, split).values()} for split in ("train", "val", "test")}
        assert [len(part) for part in parts.values()] == [12, 4, 4]
        assert len(set.union(*parts.values())) == 20
        assert sum(label for _, label in rows(data, "test").values()) == 2  # stratified
        seen += parts["test"]
    assert len(set(seen)) == 20
    few = [make(tmp_path, text, limit=6, seed=seed) for seed in (0, 1)]
    chosen = [{s for s, _ in rows(data).values()} for data in few]
    assert [len(c) for c in chosen] == [6, 6]
    assert chosen[0] != chosen[1]


def test_reverse_complement_is_a_fair_coin_of_training_only(tmp_path: Path) -> None:
    sequence = "AACCGTTTGCA"
    text = "sequence,label\n" + f"{sequence},0\n{sequence},1\n" * 200
    for tokenizer in (TOKENIZER, KmerTokenizer(KmerTokenizerConfig(align="left"))):
        data = make(tmp_path, text, rc_augment=True, batch_size=50)
        data.tokenizer = tokenizer
        forward = tokenizer.encode(sequence).tolist()
        other = tokenizer.encode(reverse_complement(sequence.encode())).tolist()
        loader = data.train_dataloader()
        turned = []
        for _ in range(2):
            order = {}
            for batch in loader:
                for ids, valid, index in zip(batch["ids"], batch["valid"], batch["index"], strict=True):
                    assert ids[valid].tolist() in (forward, other)
                    order[int(index)] = ids[valid].tolist() == other
            turned.append([order[i] for i in range(400)])
        assert 160 < sum(turned[0]) < 240
        assert turned[0] != turned[1]
        plain = next(iter(data.loader("train", train=False)))
        assert all(ids[valid].tolist() == forward for ids, valid in zip(plain["ids"], plain["valid"], strict=True))


def test_both_strands_in_a_batch(tmp_path: Path) -> None:
    text = "sequence,mate,label\n" + "AACCG,TTT,0\nGTTTGCA,C,1\n" * 8
    for fields in ({}, {"sequence2": "mate"}):
        data = make(tmp_path, text, rc_views=True, rc_augment=True, batch_size=16, **fields)
        batch = next(iter(data.train_dataloader()))
        forward, backward = 0, 0
        for i in range(16):
            one, two = (batch[k][i][batch[v][i]].tolist() for k, v in (("ids", "valid"), ("ids_rc", "valid_rc")))
            texts = [("AACCG", "TTT"), ("GTTTGCA", "C")][int(batch["labels"][i])]
            turned = [reverse_complement(t.encode()) for t in texts]
            if fields:
                want = [TOKENIZER.encode_pair(*pair)[0].tolist() for pair in (texts, turned)]
            else:
                want = [TOKENIZER.encode(texts[0]).tolist(), TOKENIZER.encode(turned[0]).tolist()]
            assert [one, two] in (want, want[::-1])
            forward, backward = forward + ([one, two] == want), backward + ([one, two] != want)
        assert forward
        assert backward


def test_the_other_strand_may_be_longer(tmp_path: Path) -> None:
    tokenizer = tokenizers.from_catalogue("dna-bpe1024")
    text = next(
        t
        for t in ("".join(np.random.default_rng(i).choice(list("ACGT"), 40)) for i in range(100))
        if len(tokenizer.encode(reverse_complement(t.encode()))) > len(tokenizer.encode(t))
    )
    longest = len(tokenizer.encode(reverse_complement(text.encode())))
    for fields in ({"rc_augment": True}, {"rc_views": True}):
        data = make(tmp_path, f"sequence,label\n{text},0\nA,1\n", max_len=longest - 1, **fields)
        data.tokenizer = tokenizer
        with pytest.raises(ZooError, match=rf"row 1: the sequence has {longest} tokens"):
            data.setup()


def test_lengths(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"row 2: the sequence has 7 tokens, more than data.max_len=5"):
        make(tmp_path, TABLE, max_len=5).setup()
    cut = make(tmp_path, TABLE, max_len=5, truncate="right")
    assert rows(cut)[1][0] == "GGGT"
    assert make(tmp_path, TABLE, max_len=5, truncate="left").max_tokens == 5
    assert rows(make(tmp_path, TABLE, max_len=5, truncate="left"))[1][0] == "GTTT"
    batch = next(iter(make(tmp_path, TABLE, pad_to=12, pad_side="right").train_dataloader()))
    assert batch["ids"].shape == (2, 12)
    assert batch["valid"][:, 0].all()


def test_bucketing_uses_token_lengths(tmp_path: Path) -> None:
    text = "sequence,label\n" + "".join(f"{'A' * (1 + i % 50)},{i % 2}\n" for i in range(200))
    widths = [(~batch["valid"]).sum().item() for batch in make(tmp_path, text, bucket=100).train_dataloader()]
    plain = [(~batch["valid"]).sum().item() for batch in make(tmp_path, text).train_dataloader()]
    assert sum(widths) < sum(plain) / 5


def test_upper_and_class_weights(tmp_path: Path) -> None:
    text = "sequence,label\nacgt,0\nac,1\ngg,1\ntt,1\n"
    assert rows(make(tmp_path, text, upper=True))[0][0] == "ACGT"
    assert rows(make(tmp_path, text))[0][0] == ""
    assert make(tmp_path, text).class_weights is None
    weights = make(tmp_path, text, class_weights=True).class_weights
    assert weights is not None
    assert np.allclose(weights, [2, 2 / 3])


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("seqence,label\nA,0\n", {}, "no column 'sequence'.*did you mean 'seqence'"),
        (TABLE, {"label": "lable"}, "no column 'lable'.*did you mean 'label'"),
        ("sequence,label\nA,0\nC\n", {}, "row 2 has 1 fields, its header has 2"),
        ("sequence,label\n", {}, "holds no rows"),
        ("sequence,label\n,0\nA,1\n", {}, "row 1: the column 'sequence' is empty"),
        (TABLE, {"classes": ["a", "b"]}, "row 3: label '2' is none of the 2 classes"),
        ("sequence,label\nA,x\nC,\n", {"classes": ["x", "y"]}, "row 2: label is empty"),
        ("sequence,label\nA,1.5\nC,abc\n", {"task": "regression"}, "row 2: 'label' must be a finite number, got 'abc'"),
        ("sequence,label\nA,1\nC,nan\n", {"task": "regression"}, "finite number, got 'nan'"),
        ("sequence,a,b\nA,1,2\n", {"task": "multilabel", "label": ["a", "b"]}, "row 1: 'b' must be 0 or 1, got 2"),
        ("sequence,label\nA,p;z\n", {"task": "multilabel", "classes": ["p", "q"]}, "'z' is none of the classes"),
        ("sequence,label\nA,only\nC,only\n", {}, "one class only"),
        ("sequence,label\nACG,01\n", {"task": "token"}, "row 1: 2 labels for 3 bases"),
        ("sequence,label\nACG,012\n", {"task": "token", "classes": ["0", "1"]}, "label '2' is none of the classes"),
        ("sequence,label\nACG,000\n", {"task": "token"}, "one class only"),
        (TABLE, {"train": {"path": "other.csv"}}, "'other.csv' does not exist"),
        (TABLE, {"train": {"path": "train.csv", "sha256": "0" * 64}}, "not the one the data set was published with"),
        (TABLE, {"root": "/nowhere"}, "folder '/nowhere' does not exist; set data.root"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        make(tmp_path, text, **fields).setup()
    assert "\n" not in str(caught.value)


def test_empty_broken_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"")
    with pytest.raises(ZooError, match="is empty"):
        make(tmp_path).setup()
    packed = gzip.compress(TABLE.encode() * 100)
    (tmp_path / "train.csv").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ZooError, match="broken gzip file"):
        make(tmp_path).setup()
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ZooError, match="not a text file"):
        make(tmp_path).setup()
    with pytest.raises(ZooError, match="no val split"):
        make(tmp_path, TABLE).loader("val")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folds": 2}, "folds must be at least 3"),
        ({"label": ["a", "b"]}, "one column when task is multiclass"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"batch_size": 0}, "at least 1"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
    ],
)
def test_config_mistakes(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, TABLE, **fields)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("sequence,label\nACGT,0\nACG,\nAC,1\n", {}, "row 2: label is empty"),
        ("sequence,label\nACGT,x\nACG, \nAC,y\n", {}, "row 2: label is empty"),
        ("sequence,label\nACGT,0\nACG,1\n", {"classes": ["1", "2"]}, "label '0' is none of the 2 classes"),
        ("sequence,label\nACGT,0\nACG,1000000000\n", {}, "too large for classes"),
        ("sequence,label,label\nACGT,0,1\n", {}, "two columns 'label'"),
        ("sequence,label\nACGT,1e39\n", {"task": "regression"}, "finite number"),
        ("sequence,label\nACGT,0\nACGT,1\n", {"val_fraction": 0.5}, "too few different ones"),
    ],
)
def test_tables_that_would_be_misread(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        make(tmp_path, text, **fields).setup()


def test_blanks_around_labels_and_inside_sequences(tmp_path: Path) -> None:
    data = make(tmp_path, '\ufeffsequence,label\r\n"AC\nG T",x\r\nACG,x \r\nAC,y\r\n')
    assert rows(data) == {0: ("ACGT", 0), 1: ("ACG", 0), 2: ("AC", 1)}


@pytest.mark.parametrize("fields", [{"val_fraction": 0.25}, {"folds": 4, "fold": 1}])
def test_equal_sequences_stay_together(tmp_path: Path, fields: dict[str, Any]) -> None:
    text = "".join(f"AAC{'ACGT'[i % 4]}{'acgt'[i // 4 % 4]},{i % 2}\n" for i in range(64))
    data = make(tmp_path, "sequence,label\n" + text, **fields)
    data.setup()
    found = [set(source.texts) for source in data.sources.values()]  # type: ignore[attr-defined]
    assert len(set.union(*found)) == sum(map(len, found)) == 16
    assert len(data.sources["val"]) in (16, 20)


def test_no_tokenizer() -> None:
    with pytest.raises(ZooError, match="needs a tokenizer"):
        datamodules.build(datamodules.section("uci_splice"), None)
    with pytest.raises(ZooError, match="did you mean 'uci_splice'"):
        datamodules.section("uci_splic")


SIZES = {
    "uci_splice": (1700, 300, 1186),
    "chr20_splice": (8000, 1500, 3000),
    "species5": (2000, 400, 800),
    "coding_leptospira": (3500, 500, 999),
    "ecoli_promoters106": (63, 21, 22),
}


TEXT = [
    name
    for name in datamodules.names()
    if not name.startswith("gue_") and datamodules.section(name)["name"] in ("labelled", "genome")
]


@pytest.mark.parametrize("name", TEXT)
def test_shipped_data_sets(name: str) -> None:
    section = datamodules.section(name)
    data = datamodules.build(section, TOKENIZER)
    for file in data.files():
        assert len(file["sha256"]) == 64
    data.setup()
    assert section["title"]
    assert section["source"]
    assert section["licence"]
    if name in SIZES:
        assert tuple(len(data.sources[split]) for split in ("train", "val", "test")) == SIZES[name]
        assert data.class_counts is not None
        assert data.class_counts.sum() == SIZES[name][0]
    batch = next(iter(data.train_dataloader()))
    assert batch["ids"].shape == batch["valid"].shape
    assert batch["ids"].shape[1] <= data.max_tokens


@pytest.mark.parametrize("name", [name for name in datamodules.names() if name.startswith("gue_")])
def test_gue(name: str, shared: Path) -> None:
    section = datamodules.section(name, root=str(shared / "data" / "gue" / name.removeprefix("gue_")))
    data = datamodules.build(section, TOKENIZER)
    data.setup()
    assert data.num_outputs == 2
    with pytest.raises(ZooError, match=r"set data.root to the folder that holds 'train.csv'"):
        datamodules.build(datamodules.section(name), TOKENIZER).setup()


def test_files_are_hashed_as_they_lie(tmp_path: Path) -> None:
    data = make(tmp_path, TABLE)
    assert data.files()[0]["sha256"] == hashlib.sha256(TABLE.encode()).hexdigest()
    (tmp_path / "train.csv").write_text(TABLE + "A,1\n")
    assert data.files()[0]["sha256"] != hashlib.sha256(TABLE.encode()).hexdigest()


def test_splits_that_share_sequences_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("sequence,label\nacgt,0\nGGGG,1\n")
    (tmp_path / "test.csv").write_text("sequence,label\nGGGG,0\nTTAA,1\nACGT,0\n")
    data = make(tmp_path, TABLE, val={"path": "val.csv"}, test={"path": "test.csv"})
    assert data.facts()["shared"].split("; ") == [
        "1 of 2 val sequences stand in train too",
        "1 of 3 test sequences stand in val too",
        "2 of 3 test sequences stand in train too",
    ]
    assert make(tmp_path, TABLE).facts() == {}
