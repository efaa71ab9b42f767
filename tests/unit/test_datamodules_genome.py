"""Genomes: random access, windows, splits, augmentation, N, warm-up; official interval vectors; clear mistakes."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo.datamodules as datamodules
from zoo.datamodules.augment import reverse_complement
from zoo.datamodules.fasta import Genome, read_fasta
from zoo.datamodules.genome import GenomeData
from zoo.errors import ConfigError, ZooError
from zoo.tokenizers.char import CharTokenizer, CharTokenizerConfig
from zoo.tokenizers.kmer import KmerTokenizer

TOKENIZER = CharTokenizer()
GOLDEN = Path(__file__).parent.parent / "parity" / "cases" / "hyenadna" / "data" / "intervals_and_pooling.json"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


def wrapped(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width)) + "\n"


def random_dna(length: int, seed: int, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


def make(folder: Path, text: str = "", tokenizer: Any = TOKENIZER, seed: int = 0, **fields: Any) -> GenomeData:
    if text:
        (folder / "g.fa").write_text(text)
    section = {"name": "genome", "root": str(folder), "files": [{"path": "g.fa"}], "batch_size": 2, **fields}
    data = datamodules.build(section, tokenizer, seed)
    assert isinstance(data, GenomeData)
    return data


def texts(data: GenomeData, split: str = "train", train: bool | None = False) -> list[str]:
    """The bases of one pass over a split; what is no base is '?'."""
    out = []
    for batch in data.loader(split, train=train):
        for ids, valid in zip(batch["ids"], batch["valid"], strict=True):
            names = TOKENIZER.tokens(ids[valid].tolist())
            out.append("".join(name if len(name) == 1 else "?" for name in names))
    return out


# random access


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_random_access(tmp_path: Path, packed: bool, end: str) -> None:
    sequences = {"chr1": random_dna(997, 1, "ACGTNacgt"), "chr2": random_dna(60, 2), "one": "A"}
    text = "".join(f">{name} about it\n{wrapped(s, 60)}" for name, s in sequences.items()).replace("\n", end)
    path = tmp_path / ("g.fa.gz" if packed else "g.fa")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    genome = Genome([path])
    assert {name: r.length for name, r in genome.records.items()} == {n: len(s) for n, s in sequences.items()}
    rng = np.random.default_rng(3)
    for genome in (genome, pickle.loads(pickle.dumps(genome))):  # noqa: B020  (the second as a worker gets it)
        for name, sequence in sequences.items():
            for _ in range(200):
                start, stop = sorted(rng.integers(-5, len(sequence) + 6, 2).tolist())
                assert genome.read(name, start, stop).tobytes().decode() == sequence[max(start, 0) : max(stop, 0)]
            assert genome.read(name).tobytes().decode() == sequence
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no index beside the data
    assert {header.split()[0]: s.decode() for header, s in read_fasta(path)} == sequences


def test_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">x\nACGT\n")
    (tmp_path / "b.fa").write_text(">y\nGG\nT\n")
    genome = Genome([tmp_path / "a.fa", tmp_path / "b.fa"])
    assert genome.read("y").tobytes() == b"GGT"
    assert genome.read("x", 1, 3).tobytes() == b"CG"
    with pytest.raises(ZooError, match="no sequence 'z'"):
        genome.read("z")
    (tmp_path / "b.fa").write_text(">x\nGG\n")
    with pytest.raises(ZooError, match="'x' occurs twice"):
        Genome([tmp_path / "a.fa", tmp_path / "b.fa"])


def test_uneven_lines(tmp_path: Path) -> None:
    path = tmp_path / "g.fa"
    path.write_text(">x y\nACGT\nAC\nACGTACGT\n\n>z\nGG\n")
    for _ in range(2):
        genome = Genome([path])
        assert genome.read("x").tobytes() == b"ACGTACACGTACGT"
        assert genome.read("x", 3, 7).tobytes() == b"TACA"
        assert genome.read("z").tobytes() == b"GG"


def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "g.fa"
    path.write_text(">x\nACGT\n")
    assert Genome([path]).read("x").tobytes() == b"ACGT"
    path.write_text(">x\nACGTA\n")
    os.utime(path, ns=(1, 1))
    assert Genome([path]).read("x").tobytes() == b"ACGTA"


# official vectors


def test_official_intervals(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    for case in golden["intervals"]:
        (tmp_path / "i.bed").write_text(f"{case['chr']}\t{case['start']}\t{case['end']}\ttrain\n")
        data = make(
            tmp_path, golden["fasta"], intervals={"path": "i.bed"}, length=case["max_length"], split={"by": "bed"},
            pad_interval=case["pad_interval"],
        )  # fmt: skip
        data.setup()
        letters, real = data.sources["train"].bases(np.array([0]))
        assert letters[0, : real[0]].tobytes().decode() == case["seq"], case
        batch = next(iter(data.loader("train")))
        assert batch["ids"][0].tolist() == TOKENIZER.encode(case["seq"], add_special=False).tolist()
    for case in golden["reverse_complement"]:
        assert reverse_complement(case["seq"].encode()).decode() == case["rc"]


# windows and splits


def test_tiling_by_position(tmp_path: Path) -> None:
    one, two = random_dna(1000, 4), random_dna(95, 5)
    text = f">a\n{wrapped(one, 70)}>b\n{wrapped(two, 70)}"
    split = {"by": "position", "train": [0, 0.5], "val": [0.5, 0.8], "test": [0.8, 1.0]}
    data = make(tmp_path, text, length=40, split=split)
    want = [one[i : i + 40] for i in range(0, 461, 40)] + [two[0:40]]
    assert texts(data) == want
    assert texts(data, "val") == [one[i : i + 40] for i in range(500, 761, 40)]
    assert texts(data, "test") == [one[i : i + 40] for i in range(800, 961, 40)]
    dense = make(tmp_path, length=40, stride=10, split={"train": [0, 500], "val": [500, 800], "test": [800, 1000]})
    assert texts(dense)[:3] == [one[0:40], one[10:50], one[20:60]]
    assert texts(dense, "val") == [one[i : i + 40] for i in range(500, 761, 10)]


def test_split_by_name_and_by_interval(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(4)]
    text = "".join(f">{name}\n{wrapped(random_dna(800, i), 80)}" for i, name in enumerate(names))
    data = make(tmp_path, text, length=100, split={"by": "sequence", "val_names": ["c1"], "test_names": ["c2"]})
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 16, "val": 8, "test": 8}
    drawn = {"by": "interval", "val_fraction": 0.25, "test_fraction": 0.25}
    parts = [
        set(texts(make(tmp_path, length=100, split=drawn, seed=seed), s))
        for seed in (0, 9)
        for s in ("train", "val", "test")
    ]
    assert parts[:3] == parts[3:]  # the run's seed does not move the split
    assert sum(map(len, parts[:3])) == len(set.union(*parts[:3])) == 32
    assert 2 <= len(parts[1]) <= 14
    other = make(tmp_path, length=100, split={**drawn, "seed": 1})
    assert set(texts(other, "test")) != parts[2]
    with pytest.raises(ZooError, match="no sequence 'c9'"):
        make(tmp_path, length=100, split={"by": "sequence", "val_names": ["c9"]}).setup()


def test_bed_splits(tmp_path: Path) -> None:
    sequence = random_dna(500, 6)
    (tmp_path / "i.bed").write_text(
        "# comment\na\t0\t50\ttrain\na\t100\t150\tvalid\na\t200\t250\ttest\na\t480\t500\ttest\n"
    )
    data = make(tmp_path, f">a\n{wrapped(sequence, 60)}", intervals={"path": "i.bed"}, length=50, split={"by": "bed"})
    assert texts(data) == [sequence[0:50]]
    assert texts(data, "val") == [sequence[100:150]]
    assert texts(data, "test") == [sequence[200:250], sequence[465:500]]
    batch = next(iter(data.loader("test")))
    assert batch["valid"].sum(1).tolist() == [50, 35]
    assert batch["valid"][1].tolist() == [False] * 15 + [True] * 35  # the tokenizer pads on the left


# augmentation


def test_reverse_complement_and_shift(tmp_path: Path) -> None:
    sequence = random_dna(4000, 7)
    split = {"train": [0, 3000], "val": [3000, 4000], "test": [4000, 4000]}
    data = make(tmp_path, f">a\n{wrapped(sequence, 60)}", length=50, split=split, rc_augment=True, shift=7)
    loader = data.train_dataloader()
    passes = [
        {int(i): TOKENIZER.sequence(row.tolist()) for b in loader for i, row in zip(b["index"], b["ids"], strict=True)}
        for _ in range(2)
    ]
    assert passes[0] != passes[1]
    turned, moves = 0, set()
    for index, text in passes[0].items():
        place = sequence.find(text)
        if place < 0:
            place, turned = sequence.find(reverse_complement(text.encode()).decode()), turned + 1
        assert 0 <= place <= 2950  # never leaves the training part
        assert abs(place - 50 * index) <= 7
        moves.add(place - 50 * index)
    assert 15 < turned < 45
    assert len(moves) > 10
    again = make(tmp_path, length=50, split=split, rc_augment=True, shift=7).train_dataloader()
    assert passes[0] == {
        int(i): TOKENIZER.sequence(r.tolist()) for b in again for i, r in zip(b["index"], b["ids"], strict=True)
    }
    assert texts(data) == [sequence[i : i + 50] for i in range(0, 2951, 50)]  # none of it when not training
    assert texts(data, "val") == [sequence[i : i + 50] for i in range(3000, 3951, 50)]


def test_random_places(tmp_path: Path) -> None:
    one, two = random_dna(3000, 8), random_dna(1000, 9)
    text = f">a\n{wrapped(one, 60)}>b\n{wrapped(two, 60)}"
    split = {"train": [0, 0.5], "val": [0.5, 1.0], "test": [1.0, 1.0]}
    data = make(tmp_path, text, length=30, split=split, samples=2000, batch_size=50)
    found = texts(data, train=True)
    assert len(found) == 2000
    places = [one[:1500].find(t) for t in found]
    assert all(p >= 0 or two[:500].find(t) >= 0 for p, t in zip(places, found, strict=True))
    assert 0.70 < np.mean([p >= 0 for p in places]) < 0.80  # 1471 of 1942 places
    assert len({p for p in places if p >= 0}) > 900
    assert len(texts(data)) == 1500 // 30 + 500 // 30


@pytest.mark.parametrize("eos", [False, True])
def test_length_warm_up_keeps_the_bases_of_a_batch(tmp_path: Path, eos: bool) -> None:
    sequence = random_dna(6400, 10)
    stages = [{"length": 16, "batches": 3}, {"length": 32, "batches": 40}]
    split = {"train": [0.0, 1.0], "val": [1.0, 1.0], "test": [1.0, 1.0]}
    data = make(tmp_path, f">a\n{wrapped(sequence, 60)}", length=64, split=split, warmup=stages, add_eos=eos)
    plain = make(tmp_path, length=64, split=split)
    loader, whole = data.train_dataloader(), plain.train_dataloader()
    shapes = []
    for _ in range(2):
        for batch, full in zip(loader, whole, strict=True):
            ids = batch["ids"][:, :-1] if eos else batch["ids"]
            assert torch.equal(ids.reshape(2, 64), full["ids"])
            if eos:
                assert (batch["ids"][:, -1] == 1).all()
                assert batch["valid"].all()
            assert len(batch["index"]) == len(ids)
            shapes.append(tuple(ids.shape))
    assert shapes == [(8, 16)] * 3 + [(4, 32)] * 40 + [(2, 64)] * 57
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [len(b["ids"]) for b in again][:3] == [8, 4, 4]


# letters


def test_unknown_bases(tmp_path: Path) -> None:
    text = ">a\n" + "ACGTNNNNNN" + "ACGTACGTNA" + "acgtacgtac" + "\n"
    split = {"train": [0.0, 1.0], "val": [1.0, 1.0], "test": [1.0, 1.0]}
    assert texts(make(tmp_path, text, length=10, split=split)) == ["ACGTNNNNNN", "ACGTACGTNA", "??????????"]
    drop = make(tmp_path, length=10, split=split, n_policy="drop", max_n=0.1, upper=True)
    assert texts(drop) == ["ACGTACGTNA", "ACGTACGTAC"]
    pad = make(tmp_path, length=10, split=split, n_policy="pad", batch_size=3)
    batch = next(iter(pad.loader("train", train=False)))
    assert batch["ids"][0].tolist() == [7, 8, 9, 10] + [4] * 6
    assert batch["valid"][1].tolist() == [True] * 8 + [False, True]
    with pytest.raises(ZooError, match="character tokenizer"):
        next(iter(make(tmp_path, length=6, split=split, n_policy="pad", tokenizer=KmerTokenizer()).loader("train")))
    with pytest.raises(ZooError, match="no window of length 10"):
        make(tmp_path, ">a\n" + "N" * 30 + "\n", length=10, n_policy="drop").setup()


def test_kmers_and_right_padding(tmp_path: Path) -> None:
    sequence = random_dna(600, 11)
    split = {"train": [0.0, 1.0], "val": [1.0, 1.0], "test": [1.0, 1.0]}
    tokenizer = KmerTokenizer()
    data = make(tmp_path, f">a\n{wrapped(sequence, 60)}", length=60, split=split, tokenizer=tokenizer, add_eos=True)
    batch = next(iter(data.loader("train", train=False)))
    assert batch["ids"][0].tolist() == [*tokenizer.encode(sequence[:60], add_special=False), 2]
    assert data.max_tokens == 11
    (tmp_path / "i.bed").write_text("a\t0\t60\na\t580\t600\n")
    right = CharTokenizer(CharTokenizerConfig(pad_side="right"))
    short = make(
        tmp_path, length=60, intervals={"path": "i.bed"}, split={"by": "bed"}, tokenizer=right, add_eos=True
    )  # fmt: skip
    batch = next(iter(short.loader("train", train=False)))
    assert batch["ids"].shape == (2, 61)
    assert batch["valid"].sum(1).tolist() == [61, 41]
    assert batch["ids"][1, 40].item() == 1
    assert batch["ids"][1, 41:].tolist() == [4] * 20


# mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"ACGT\n", "is not FASTA: it begins with b'ACGT'"),
        (b"@read\nACGT\n+\nIIII\n", "is not FASTA"),
        (b">x\n", "holds no bases"),
        (b">x\nACGTACGT\n>x\nAC\n", "cannot be indexed as FASTA"),
        (gzip.compress(b">x\nACGTACGT\n" * 50)[:20], "broken gzip file"),
        (b">x\nACGTACGT\n", "no window of length 1024 fits any split: the longest sequence has 8 bases"),
    ],
)
def test_bad_fasta(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "g.fa").write_bytes(content)
    with pytest.raises(ZooError, match=message) as caught:
        make(tmp_path).setup()
    assert "\n" not in str(caught.value)


def test_missing_fasta(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"data file 'g\.fa' does not exist"):
        make(tmp_path).setup()
    with pytest.raises(ZooError, match="does not exist"):
        list(read_fasta(tmp_path / "none.fa"))
    (tmp_path / "t.fa").write_text("ACGT\n")
    with pytest.raises(ZooError, match="is not FASTA"):
        list(read_fasta(tmp_path / "t.fa"))


@pytest.mark.parametrize(
    ("bed", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "holds no intervals"),
        ("a\t10\n", "line 1 is not BED"),
        ("a\tten\t20\n", "line 1 is not BED"),
        ("a\t0\t10\ttrain\na\t5\t10\ttrian\n", "line 2: unknown split 'trian' .did you mean 'train'"),
        ("a\t50\t150\ttrain\n", "50-150 lies outside 'a', which has 100 bases"),
        ("b\t0\t10\n", "no sequence 'b'"),
    ],
)
def test_bad_bed(tmp_path: Path, bed: str, message: str) -> None:
    (tmp_path / "i.bed").write_text(bed)
    with pytest.raises(ZooError, match=message):
        make(tmp_path, ">a\n" + "A" * 100 + "\n", intervals={"path": "i.bed"}, length=10, split={"by": "bed"}).setup()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": []}, "at least one FASTA"),
        ({"length": 0}, "length"),
        ({"warmup": [{"length": 100, "batches": 2}]}, "must divide length 1024"),
        ({"split": {"by": "bed"}}, "needs intervals"),
        ({"split": {"by": "chance"}}, "split.by"),
        ({"shift": -1}, "negative"),
        ({"n_policy": "remove"}, "n_policy"),
    ],
)
def test_config_mistakes(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **fields)


def test_the_chromosome_split_of_the_published_floors() -> None:
    data = datamodules.build(datamodules.section("chr20", length=1000), TOKENIZER)
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 5000, "val": 500, "test": 500}
    assert data.sources["test"].windows.start[0] == 5_500_000
    assert (data.task_kind, data.num_outputs) == ("lm", 0)


# what must not reach two splits, and files that editors have touched
def covered(data: GenomeData) -> dict[str, set[tuple[int, int]]]:
    data.setup()
    found = {}
    for split, source in data.sources.items():
        w = source.windows  # type: ignore[attr-defined]
        spans = zip(w.sequence.tolist(), w.start.tolist(), w.end.tolist(), strict=True)
        found[split] = {(number, place) for number, start, end in spans for place in range(start, end)}
    return found


def test_overlapping_windows_drawn_by_chance_share_no_base(tmp_path: Path) -> None:
    text = ">a\n" + wrapped(random_dna(2000, 1), 60) + ">b\n" + wrapped(random_dna(900, 2), 60)
    split = {"by": "interval", "val_fraction": 0.1, "test_fraction": 0.1}
    parts = covered(make(tmp_path, text, length=16, stride=8, split=split))
    assert set(parts) == {"train", "val", "test"}
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))


def test_a_shift_stops_at_held_out_intervals(tmp_path: Path) -> None:
    (tmp_path / "i.bed").write_text("a\t20\t30\ttrain\na\t32\t42\tval\na\t10\t18\ttest\na\t70\t80\ttrain\n")
    data = make(tmp_path, ">a\n" + random_dna(100, 1) + "\n", length=10, intervals={"path": "i.bed"},
                split={"by": "bed"}, shift=50)  # fmt: skip
    data.setup()
    windows = data.sources["train"].windows  # type: ignore[attr-defined]
    assert windows.low.tolist() == [19, 42]  # the test interval grew to 9-19
    assert windows.high.tolist() == [32, 100]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": [0, 0.9], "val": [0.8, 1.0]}, "train and split.val overlap"),
        ({"train": [0, 90], "val": [0.5, 0.95]}, "overlap in sequence 'a'"),
        ({"by": "sequence", "val_names": ["a"], "test_names": ["a"]}, "val_names and test_names"),
        ({"by": "interval", "val_fraction": 0.7, "test_fraction": 0.7}, "more than 1 together"),
    ],
)
def test_splits_that_overlap_are_refused(tmp_path: Path, split: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        make(tmp_path, ">a\n" + random_dna(100, 1) + "\n", length=5, split=split).setup()


def test_the_fourth_column_of_a_bed_file_is_a_name_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "i.bed").write_text("a\t0\t10\tpeak1\t0\t+\r\ntrack1\t0\t10\tpeak2\r\n")
    text = f">a\n{random_dna(20, 1)}\n>track1\n{random_dna(20, 2)}\n"
    split = {"by": "interval", "val_fraction": 0, "test_fraction": 0}
    data = make(tmp_path, text, length=10, intervals={"path": "i.bed"}, split=split)
    assert len(texts(data)) == 2
    with pytest.raises(ZooError, match="unknown split 'peak1'"):
        make(tmp_path, length=10, intervals={"path": "i.bed"}, split={"by": "bed"}).setup()


@pytest.mark.parametrize("end", ["\n", " \n", "\r\n", "\t\r\n"])
@pytest.mark.parametrize("lead", ["", "\ufeff"])
def test_blanks_and_marks_of_editors(tmp_path: Path, end: str, lead: str) -> None:
    dna = random_dna(100, 3)
    (tmp_path / "e.fa").write_bytes((lead + ">a" + end + wrapped(dna, 17).replace("\n", end)).encode())
    genome = Genome([tmp_path / "e.fa"])
    assert [genome.read("a", i, i + 30).tobytes().decode() for i in range(70)] == [dna[i : i + 30] for i in range(70)]
    assert list(read_fasta(tmp_path / "e.fa")) == [("a", dna.encode())]


def test_a_blank_where_the_line_length_hides_it(tmp_path: Path) -> None:
    (tmp_path / "e.fa").write_text(">a\nACGTA\nAC TA\nAC\n")
    with pytest.raises(ZooError, match="blanks inside the lines of 'a'"):
        Genome([tmp_path / "e.fa"]).read("a")


def test_an_index_appears_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyfaidx

    (tmp_path / "e.fa").write_text(">a\nACGT\n>b\nACGT\n")
    places: list[Path] = []
    whole = pyfaidx.Faidx.__init__

    def watched(self: Any, filename: str, indexname: str, **options: Any) -> None:
        places.append(Path(indexname))
        whole(self, filename, indexname=indexname, **options)

    monkeypatch.setattr(pyfaidx.Faidx, "__init__", watched)
    assert list(Genome([tmp_path / "e.fa"]).records) == list(Genome([tmp_path / "e.fa"]).records) == ["a", "b"]
    built, read = places
    assert built != read  # written elsewhere, then renamed
    assert read.is_file()
    assert not built.parent.exists()
