"""GenBank and GFF3 features to labelled sets."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import yaml

import zoo.datamodules as datamodules
from zoo._resources import folder
from zoo.datamodules.augment import reverse_complement
from zoo.datamodules.features import (
    Annotated,
    Feature,
    coding_windows,
    feature_rows,
    read_annotated,
    write_csv,
)
from zoo.datamodules.make_set import make_set
from zoo.errors import ZooError
from zoo.tokenizers.char import CharTokenizer

PHIX = folder("datamodules") / "genomes" / "phix174_NC_001422.gbk"


def test_genbank() -> None:
    (record,) = read_annotated(PHIX)
    assert (record.name, len(record.sequence)) == ("NC_001422.1", 5386)
    coding = [feature for feature in record.features if feature.kind == "CDS"]
    assert len(coding) == 11
    for feature in coding:
        text = record.of(feature)
        assert text[:3] == b"ATG"
        assert text[-3:] in (b"TAA", b"TAG", b"TGA")
        assert len(text) % 3 == 0
    assert coding[0].parts == ((3980, 5386), (0, 136))  # over the origin of the circle
    assert coding[0].name == "rf replication, viral strand synthesis protein"


def random_dna(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(b"ACGT", np.uint8), length).tobytes()


def write_gff(path: Path, sequence: bytes, inline: bool) -> None:
    lines = [
        "##gff-version 3",
        "c1\tx\tCDS\t11\t20\t.\t+\t0\tID=a;gene=first",
        "c1\tx\tCDS\t31\t40\t.\t-\t0\tID=b",
        "c1\tx\tCDS\t51\t60\t.\t-\t0\tID=b",
        "c1\tx\ttRNA\t81\t90\t.\t.\t.\tName=t%3B1",
    ]
    if inline:
        lines += ["##FASTA", ">c1 about", sequence[:50].decode().lower(), sequence[50:].decode()]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("inline", [True, False])
def test_gff(tmp_path: Path, inline: bool) -> None:
    sequence = random_dna(100, 1)
    write_gff(tmp_path / "a.gff", sequence, inline)
    (tmp_path / "a.fa").write_bytes(b">c1 x\n" + sequence + b"\n")
    (record,) = read_annotated(tmp_path / "a.gff", None if inline else tmp_path / "a.fa")
    first, second, third = record.features
    assert (first.name, record.of(first)) == ("first", sequence[10:20])
    assert second.parts == ((30, 40), (50, 60))
    assert record.of(second) == reverse_complement(sequence[30:40] + sequence[50:60])
    assert record.of(second, flank=5) == reverse_complement(sequence[25:40] + sequence[50:65])
    assert (third.name, third.strand, record.of(third)) == ("t;1", 0, sequence[80:90])
    rows = feature_rows([record], ["CDS", "tRNA"])
    assert [(row.label, row.start, row.end, row.strand) for row in rows] == [
        ("CDS", 10, 20, 1), ("CDS", 30, 60, -1), ("tRNA", 80, 90, 0),
    ]  # fmt: skip
    assert len(feature_rows([record], ["CDS"], longest=10)) == 1
    with pytest.raises(ZooError, match="no feature of type rRNA; the file has: CDS, tRNA"):
        feature_rows([record], ["rRNA"])


def annotated(seed: int, name: str, genes: int = 40) -> Annotated:
    rng = np.random.default_rng(seed)
    features = []
    for i in range(genes):
        start = i * 500 + int(rng.integers(50))
        features.append(Feature("CDS" if i % 4 else "tRNA", ((start, start + 200),), 1))
    return Annotated(name, random_dna(genes * 500, seed), features)


def test_coding_windows() -> None:
    records = [annotated(i, f"r{i}") for i in range(3)]
    rows = coding_windows(records, 60, seed=1)
    assert sum(row.label == "1" for row in rows) == sum(row.label == "0" for row in rows) > 100
    by_name = {record.name: record for record in records}
    for row in rows:
        record = by_name[row.record]
        text = record.sequence[row.start : row.end]
        assert row.sequence.encode() == (reverse_complement(text) if row.strand < 0 else text)
        inside = [f for f in record.features if f.start <= row.start and row.end <= f.end and f.kind == "CDS"]
        touched = [f for f in record.features if f.start < row.end and row.start < f.end]
        assert bool(inside) == (row.label == "1")
        assert bool(touched) == (row.label == "1")
    assert 0.4 < np.mean([row.strand > 0 for row in rows]) < 0.6
    assert coding_windows(records, 60, seed=1) == rows
    assert coding_windows(records, 60, seed=2) != rows
    assert len(coding_windows(records, 60, per_class=7, labels=("no", "yes"))) == 14
    with pytest.raises(ZooError, match=r"0 coding and \d+ other windows of 250 bases"):
        coding_windows(records, 250)
    with pytest.raises(ZooError, match="not 99999 of each"):
        coding_windows(records, 60, per_class=99999)


@pytest.mark.parametrize("by", ["position", "record"])
def test_written_sets_are_labelled_data(tmp_path: Path, by: str) -> None:
    records = [annotated(i, f"r{i}", genes=20 + 4 * i) for i in range(12)]
    rows = coding_windows(records, 60)
    paths = write_csv(rows, tmp_path, by=by)  # type: ignore[arg-type]
    found = {name: list(csv.DictReader(path.open())) for name, path in paths.items()}
    assert sum(map(len, found.values())) == len(rows)
    assert 0.6 < len(found["train"]) / len(rows) < 0.8
    assert len(found["dev"]) > 0.05 * len(rows)
    if by == "record":
        names = [{row["record"] for row in part} for part in found.values()]
        assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    else:
        for record in {row.record for row in rows}:
            starts = {k: [int(r["start"]) for r in part if r["record"] == record] for k, part in found.items()}
            assert max(starts["train"]) < min(starts["dev"])
            assert max(starts["dev"]) < min(starts["test"])
    files = {"val" if name == "dev" else name: {"path": f"{name}.csv"} for name in paths}
    data = datamodules.build({"name": "labelled", "root": str(tmp_path), **files}, CharTokenizer())
    data.setup()
    assert len(data.sources["test"]) == len(found["test"])


def test_real_coding_windows_of_phix() -> None:
    rows = feature_rows(read_annotated(PHIX), ["CDS"], longest=600)
    assert all(set(row.sequence) <= set("ACGT") for row in rows)
    assert len(rows) >= 7


def test_a_data_set_in_one_call(tmp_path: Path) -> None:
    record = annotated(5, "r", genes=60)
    lines = [f"r\tx\t{f.kind}\t{f.start + 1}\t{f.end}\t.\t+\t0\tID=f{i}" for i, f in enumerate(record.features)]
    gff = tmp_path / "a.gff"
    gff.write_text("##gff-version 3\n" + "\n".join(lines) + "\n##FASTA\n>r\n" + record.sequence.decode() + "\n")
    path = make_set(gff, tmp_path, length=50)
    assert path.name == "data.yaml"
    section = yaml.safe_load(path.read_text())
    data = datamodules.build(section, CharTokenizer())
    data.setup()
    assert data.classes == ("other", "coding")
    assert data.max_tokens == 51
    assert sum(len(source) for source in data.sources.values()) == len(coding_windows([record], 50))
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text() + "A,coding,x,0,1,1\n")
    with pytest.raises(ZooError, match="not the one the data set was published with"):
        datamodules.build(section, CharTokenizer()).setup()
    whole = make_set(gff, tmp_path / "whole", kind="features", types=["CDS", "tRNA"])
    assert datamodules.build(yaml.safe_load(whole.read_text()), CharTokenizer()).classes == ("CDS", "tRNA")
    with pytest.raises(ZooError, match="do not fill train, dev and test"):
        make_set(gff, tmp_path / "one", length=50, by="record")
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello\n", "neither GenBank .* nor GFF3"),
        ("##gff-version 3\nc1\tx\tCDS\t1\t2\t.\t+\t0\tID=a\n", "no ##FASTA section"),
        ("##gff-version 3\nc1\tx\tCDS\n##FASTA\n>c1\nACGT\n", "line 2 is not GFF3"),
        ("##gff-version 3\nc2\tx\tCDS\t1\t2\t.\t+\t0\tID=a\n##FASTA\n>c1\nACGT\n", "no sequence 'c2'"),
        ("##gff-version 3\nc1\tx\tCDS\t1\t9\t.\t+\t0\tID=a\n##FASTA\n>c1\nACGT\n", "1-9 lies outside 'c1'"),
        ("##gff-version 3\n##FASTA\n>c1\nACGT\n", "has no features"),
        (PHIX.read_text()[:5000], "not valid GenBank: Premature end"),
        (PHIX.read_text()[:-500], "not valid GenBank: Premature end"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a").write_text(text)
    with pytest.raises(ZooError, match=message):
        read_annotated(tmp_path / "a")
    with pytest.raises(ZooError, match="does not exist"):
        read_annotated(tmp_path / "none")


def test_compressed_genbank_of_a_whole_genome(shared: Path) -> None:
    path = shared / "data" / "genomes" / "leptospira_kirschneri_H1.gbk.gz"
    records = read_annotated(path)
    assert len(records) == 75
    assert sum(len(record.sequence) for record in records) == 4_594_734
    rows = coding_windows(records, 200, per_class=2000)
    assert len(rows) == 4000
    with gzip.open(path) as stream:
        assert stream.read(5) == b"LOCUS"
