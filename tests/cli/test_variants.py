"""`zoo variants`: a VCF file in, scores out."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo.hub.artifact as artifact

Zoo = Callable[..., tuple[int, str, str]]
HEAD = [
    "##fileformat=VCFv4.2",
    '##INFO=<ID=CLNSIG,Number=.,Type=String,Description="clinical significance">',
    '##INFO=<ID=TRUTH,Number=A,Type=Integer,Description="one label an allele">',
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tSAMPLE",
]
RC = str.maketrans("ACGT", "TGCA")


def other(base: str) -> str:
    return {"A": "C", "C": "G", "G": "T", "T": "A"}[base.upper()]


def line(chrom: str, position: int, ref: str, alt: str, info: str = ".") -> str:
    return "\t".join([chrom, str(position), "rs1", ref, alt, "50", "PASS", info, "GT", "0/1"])


def fasta(path: Path, genome: dict[str, str]) -> Path:
    text = "".join(
        f">{name} a contig\n" + "".join(f"{sequence[i : i + 50]}\n" for i in range(0, len(sequence), 50))
        for name, sequence in genome.items()
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def vcf(path: Path, records: list[str]) -> Path:
    text = "\n".join([*HEAD, *records]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


@pytest.fixture
def genome() -> dict[str, str]:
    draw = random.Random(3)
    return {
        "chr1": "".join(draw.choice("ACGT") for _ in range(400)),
        "chr2": "".join(draw.choice("acgt") for _ in range(60)),
    }


@pytest.fixture
def records(genome: dict[str, str]) -> list[str]:
    """Single bases in the middle, at both ends and in lower case, an insertion, a deletion, two alleles, none."""
    one, two = genome["chr1"], genome["chr2"]
    return [
        line("chr1", 1, one[0], other(one[0]), "CLNSIG=Benign"),
        line("chr1", 200, one[199], f"{other(one[199])},{one[199]}TT", "CLNSIG=Pathogenic;TRUTH=1,0"),
        line("chr1", 210, one[209:213], one[209], "CLNSIG=Likely_benign|x"),
        line("chr1", 250, one[249], "<DEL>,*"),
        line("chr1", 260, one[259], f"{other(one[259])},<DUP>"),
        line("chr1", 300, one[299], one[299] + "ACGT" * 30),
        line("chr1", 398, one[397:400], one[397]),
        line("chr1", 400, one[399], one[399] + "ACG"),
        line("chr2", 5, two[4], other(two[4]), "CLNSIG=Pathogenic/Likely_pathogenic"),
        line("chr2", 60, two[59], other(two[59]), "CLNSIG=Uncertain_significance"),
    ]


def test_single_bases_by_hand(zoo: Zoo, models: dict[str, Path], genome: dict[str, str], tmp_path: Path) -> None:
    """The same numbers from the model called here: likelihood ratio, masked marginal, distance."""
    sequence = genome["chr1"]
    ref, alt = sequence[199], other(sequence[199])
    files = ("--vcf", vcf(tmp_path / "in.vcf", [line("chr1", 200, ref, alt)]))
    files += ("--fasta", fasta(tmp_path / "g.fa", genome), "--window", "61")
    windows = [sequence[169:199] + base + sequence[200:230] for base in (ref, alt)]
    scores = {}
    for name in ("letters", "kmers", "masked", "classes"):
        status, out, err = zoo("variants", models[name], *files)
        assert (status, err) == (0, "")
        scores[name] = float(table(out)[0]["score"])
    for name, texts in (("letters", windows), ("kmers", [text[1:] for text in windows])):
        found, sums = artifact.load(str(models[name])), []
        for text in texts:
            ids = torch.from_numpy(found.tokenizer.encode(text))[None]
            law = found.model.eval()(ids).detach()[0, :-1].log_softmax(-1)
            bases = found.tokenizer.offsets(text)[1:, 1] > 0
            sums.append(float(law.gather(-1, ids[0, 1:, None])[:, 0][torch.from_numpy(bases)].sum()))
        assert scores[name] == pytest.approx(sums[1] - sums[0], abs=2e-3)
    found = artifact.load(str(models["masked"]))
    ids = torch.from_numpy(found.tokenizer.encode(windows[0]))[None]
    ids[0, 30] = found.tokenizer.special["mask"]
    law = found.model.eval()(ids).detach()[0, 30].log_softmax(-1)
    names = found.tokenizer.vocab
    assert scores["masked"] == pytest.approx(float(law[names.index(alt)] - law[names.index(ref)]), abs=1e-4)
    found = artifact.load(str(models["classes"]))
    rows = torch.stack([torch.from_numpy(found.tokenizer.encode(text)) for text in windows])
    means = found.model.eval().forward_features(rows)[0].detach().double().mean(1)
    assert scores["classes"] == pytest.approx(float(1 - torch.cosine_similarity(means[0], means[1], dim=0)), rel=1e-3)


@pytest.mark.parametrize("name", ["letters", "kmers", "masked", "classes"])
def test_the_other_strand_is_the_mirrored_genome(
    zoo: Zoo, models: dict[str, Path], genome: dict[str, str], records: list[str], tmp_path: Path, name: str
) -> None:
    """`--strand -` on a genome is `--strand +` on its reverse complement, single bases and replaced runs alike."""
    sequence = genome["chr1"]
    places = [(120, 1, "T"), (200, 3, "CAT"), (251, 2, "GG")]
    straight, mirrored = [], []
    for start, size, alt in places:
        ref = sequence[start : start + size]
        alt = alt if alt != ref else "A" * size
        straight.append(line("chr1", start + 1, ref, alt))
        mirrored.append(line("chr1", 400 - start - size + 1, ref.translate(RC)[::-1], alt.translate(RC)[::-1]))
    one = ("--vcf", vcf(tmp_path / "a.vcf", straight), "--fasta", fasta(tmp_path / "a.fa", genome))
    back = {"chr1": sequence.translate(RC)[::-1]}
    two = ("--vcf", vcf(tmp_path / "b.vcf", mirrored), "--fasta", fasta(tmp_path / "b.fa", back))
    width = ("--window", "121" if name != "kmers" else "123")

    def run(files: tuple[object, ...], strand: str) -> list[float]:
        status, out, err = zoo("variants", models[name], *files, *width, "--strand", strand)
        assert (status, err) == (0, "")
        return [float(row["score"]) for row in table(out)]

    odd = [i for i, (_, size, _) in enumerate(places) if size % 2]  # windows are odd: those are in the very middle
    minus, plus = run(one, "-"), run(two, "+")
    assert [minus[i] for i in odd] == pytest.approx([plus[i] for i in odd], abs=2e-3)
    both, halves = run(one, "both"), [run(one, strand) for strand in "+-"]
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(*halves, strict=True)], abs=2e-3)


def test_a_batch_changes_nothing_and_every_kind_is_answered(
    zoo: Zoo, models: dict[str, Path], genome: dict[str, str], records: list[str], tmp_path: Path
) -> None:
    files = ("--vcf", vcf(tmp_path / "in.vcf.gz", records), "--fasta", fasta(tmp_path / "g.fa.gz", genome))
    for name in ("letters", "kmers", "masked", "classes"):
        status, out, err = zoo("variants", models[name], *files, "--window", "90")
        assert status == 0
        assert "2 symbolic" in err
        rows = table(out)
        alone = table(zoo("variants", models[name], *files, "--window", "90", "--batch-size", "1")[1])
        numbers = [[float(row["score"] or 0) for row in part] for part in (rows, alone)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
        notes = {row["alt"]: row["note"] for row in rows if row["note"]}
        assert notes.pop("<DEL>") == "symbolic"
        assert notes.pop("<DUP>") == "symbolic"
        assert notes.pop("*") == "spanning"
        assert list(notes.values()) == ["too_long"]
        assert len(rows) == 13
        assert all(bool(row["score"]) != bool(row["note"]) for row in rows)


def test_vcf_keeps_its_header_and_its_records(
    zoo: Zoo, models: dict[str, Path], genome: dict[str, str], records: list[str], tmp_path: Path
) -> None:
    source = vcf(tmp_path / "in.vcf.gz", records)
    files = ("--fasta", fasta(tmp_path / "g.fa", genome), "--window", "90")
    out, again = tmp_path / "out.vcf.gz", tmp_path / "again.vcf"
    assert zoo("variants", models["letters"], "--vcf", source, *files, "-o", out)[0] == 0
    assert out.read_bytes()[12:14] == b"BC"  # BGZF, which tabix reads
    lines = gzip.decompress(out.read_bytes()).decode().splitlines()
    assert [row for row in lines if row.startswith("#") and "zoo" not in row.lower()] == HEAD
    assert any(row.startswith("##INFO=<ID=ZOO_LLR,Number=A,Type=Float,Description=") for row in lines)
    assert any(row.startswith("##INFO=<ID=ZOO_NOTE,Number=A,Type=String,Description=") for row in lines)
    body = [row.split("\t") for row in lines if not row.startswith("#")]
    for row, old in zip(body, (record.split("\t") for record in records), strict=True):
        assert row[:7] + row[8:] == old[:7] + old[8:]
        assert old[7] == "." or row[7].startswith(old[7] + ";")
    scored = dict(item.split("=") for item in body[1][7].split(";"))
    assert len(scored["ZOO_LLR"].split(",")) == 2
    assert body[3][7] == "ZOO_LLR=.,.;ZOO_NOTE=symbolic,spanning"
    # a second pass replaces what the first one wrote
    assert zoo("variants", models["letters"], "--vcf", out, *files, "-o", again)[0] == 0
    assert again.read_text().splitlines() == [row.replace(str(source), str(out)) for row in lines]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.vcf", "g.fa", "in.vcf.gz", "out.vcf.gz"]


def test_labels(zoo: Zoo, models: dict[str, Path], genome: dict[str, str], records: list[str], tmp_path: Path) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    files = ("--vcf", vcf(tmp_path / "in.vcf", records), "--fasta", fasta(tmp_path / "g.fa", genome))
    status, out, err = zoo("variants", models["letters"], *files, "--label-info", "CLNSIG")
    assert status == 0
    rows = [row for row in table(out) if row["label"] and row["score"]]
    assert len(rows) == 5  # one benign, two alleles of a pathogenic record, one likely benign, one of the two words
    labels, scores = [int(row["label"]) for row in rows], [-float(row["score"]) for row in rows]
    assert f"AUROC {roc_auc_score(labels, scores):.4f}" in err
    assert f"AUPRC {average_precision_score(labels, scores):.4f}" in err
    assert "(3 pathogenic, 2 benign)" in err
    table_of = tmp_path / "truth.tsv"
    table_of.write_text(
        "chrom\tpos\tref\talt\tharmful\n"
        + "".join(f"{r['chrom']}\t{r['pos']}\t{r['ref']}\t{r['alt']}\t{r['label']}\n" for r in rows)
    )
    target = tmp_path / "scores.csv"
    status, shown, _ = zoo(
        "variants", models["letters"], *files, "--labels", table_of, "--label-column", "harmful", "-o", target
    )
    assert status == 0
    assert f"AUROC {roc_auc_score(labels, scores):.4f}" in shown
    assert target.read_text().startswith("chrom,pos,id,ref,alt,score")
    rows = table(zoo("variants", models["letters"], *files, "--label-info", "TRUTH")[1])
    assert [row["label"] for row in rows[1:3]] == ["1", "0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: [line("chr1", 7, "A", "C")], "chr1:7"),
        (lambda r: [*r, line("1", 5, "A", "C")], "did you mean 'chr1'?"),
        (lambda r: [*r, line("chr1", 400, "ACGT", "C")], "reaches beyond the end of 'chr1', which has 400 bases"),
        (lambda r: [*r, line("chr1", 7, "", "C")], "REF must be letters of DNA"),
        (lambda r: [*r, "chr1\tx\t.\tA\tC\t.\t.\t.\tGT\t0"], "POS must be a whole number"),
        (lambda r: [*r, "chr1\t7\t.\tA"], "has 4 columns, the header has 10"),
    ],
)
def test_records_that_cannot_be(
    zoo: Zoo,
    models: dict[str, Path],
    genome: dict[str, str],
    records: list[str],
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    words: str,
) -> None:
    genome["chr1"] = genome["chr1"][:6] + "G" + genome["chr1"][7:]
    files = ("--vcf", vcf(tmp_path / "in.vcf", change(records)), "--fasta", fasta(tmp_path / "g.fa", genome))
    status, out, err = zoo("variants", models["letters"], *files, "-o", tmp_path / "out.vcf")
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*out.vcf*"))
    if words == "chr1:7":
        assert "'A' but the FASTA file has 'G'" in err


def test_sentences(
    zoo: Zoo, models: dict[str, Path], genome: dict[str, str], records: list[str], tmp_path: Path
) -> None:
    source, reference = vcf(tmp_path / "in.vcf", records), fasta(tmp_path / "g.fa", genome)
    files = ("--vcf", source, "--fasta", reference)
    (tmp_path / "table.txt").write_text("a\tb\n1\t2\n")
    (tmp_path / "broken.vcf.gz").write_bytes(gzip.compress(source.read_bytes())[:-20])
    benign = vcf(tmp_path / "benign.vcf", records[:1])
    for name, arguments, words in [
        ("letters", [*files, "-o", "out.bed"], ".vcf, .vcf.gz"),
        ("letters", [*files, "-o", "nowhere/out.vcf"], "nowhere"),
        ("letters", [*files, "--score", "masked_marginal"], "score it by llr"),
        ("masked", [*files, "--score", "upstream"], "score it by masked_marginal"),
        ("classes", [*files, "--score", "llr"], "score it by distance"),
        ("letters", [*files, "--window", "500"], "at most 129"),
        ("letters", [*files, "--window", "1"], "at least 2"),
        ("letters", [*files, "--label-info", "CLNSG"], "did you mean 'CLNSIG'?"),
        ("letters", [*files, "--labels", tmp_path / "table.txt"], "no column 'chrom'"),
        ("letters", ["--vcf", benign, "--fasta", reference, "--label-info", "CLNSIG"], "0 are pathogenic and 1 benign"),
        ("letters", ["--vcf", tmp_path / "no.vcf", "--fasta", reference], "does not exist"),
        ("letters", ["--vcf", tmp_path / "table.txt", "--fasta", reference], "is not VCF"),
        ("letters", ["--vcf", tmp_path / "broken.vcf.gz", "--fasta", reference], "broken gzip"),
        ("letters", ["--vcf", source, "--fasta", source], "is not FASTA"),
    ]:
        status, out, err = zoo("variants", models[name], *arguments)
        assert (status, out) == (2, ""), err
        assert words in err
        assert err.count("\n") == 1


def test_unknown_bases(zoo: Zoo, models: dict[str, Path], tmp_path: Path) -> None:
    """N as an allele is no sequence; beside it letters are scored, k-mers that hold it are not."""
    genome = {"c": "N" * 30 + "ACGTT" * 20 + "RN"}
    rows = [line("c", 5, "N", "A"), line("c", 31, "A", "C"), line("c", 40, "T", "N"), line("c", 60, "T", "C")]
    rows.append(line("c", 131, "A", "C"))  # the genome's letter R allows it
    files = ("--vcf", vcf(tmp_path / "in.vcf", rows), "--fasta", fasta(tmp_path / "g.fa", genome), "--window", "60")
    notes = {name: [row["note"] for row in table(zoo("variants", models[name], *files)[1])] for name in models}
    assert notes["letters"] == notes["masked"] == notes["classes"] == ["ambiguous", "", "ambiguous", "", ""]
    assert notes["kmers"] == ["ambiguous", "near_unknown", "ambiguous", "", "near_unknown"]


def test_no_records(zoo: Zoo, models: dict[str, Path], genome: dict[str, str], tmp_path: Path) -> None:
    """A sample without variants gives a file without variants."""
    files = ("--vcf", vcf(tmp_path / "in.vcf", []), "--fasta", fasta(tmp_path / "g.fa", genome))
    assert zoo("variants", models["letters"], *files, "-o", tmp_path / "out.vcf")[0] == 0
    assert (tmp_path / "out.vcf").read_text().splitlines()[-1] == HEAD[-1]
