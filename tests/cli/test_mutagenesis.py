"""`zoo mutagenesis`: a folder of tables and pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

Zoo = Callable[..., tuple[int, str, str]]
ONE, TWO = "ACGTTGCAACGGTACC", "ggcatNgatt"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    file = tmp_path / "in.fa"
    file.write_text(f">one a\n{ONE}\n>two/x\n{TWO}\n")
    return file


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("letters", ["llr"]),
        ("masked", ["masked_marginal"]),
        ("classes", ["logit", "probability"]),
    ],
)
def test_tables_and_pictures(
    zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path, name: str, columns: list[str]
) -> None:
    out = tmp_path / "out"
    status, shown, err = zoo("mutagenesis", models[name], "--fasta", fasta, "-o", out)
    assert (status, err) == (0, "")
    assert "one.tsv, .png: 16 positions" in shown
    assert sorted(path.name for path in out.iterdir()) == ["one.png", "one.tsv", "two_x.png", "two_x.tsv"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    rows = table(out / "one.tsv")
    assert list(rows[0]) == ["name", "position", "ref", "alt", *columns]
    wanted = [(str(i + 1), a, b) for i, a in enumerate(ONE) for b in "ACGT" if a != b]
    assert [(row["position"], row["ref"], row["alt"]) for row in rows] == wanted
    assert len({row[columns[0]] for row in rows}) > 10
    assert len(table(out / "two_x.tsv")) == 3 * 9  # upper case, and no substitution of N
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa", "out"]


def test_region_is_a_part_of_the_whole(zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    """The sequence around the region is read as before."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert zoo("mutagenesis", models["classes"], "--fasta", fasta, "--class", "yes", "-o", whole)[0] == 0
    arguments = ("--class", "yes", "--region", "one:5-8", "-o", part)
    assert zoo("mutagenesis", models["classes"], "--fasta", fasta, *arguments)[0] == 0
    kept = [row for row in table(whole / "one.tsv") if 5 <= int(row["position"]) <= 8]
    mine = table(part / "one.tsv")
    assert [float(row["logit"]) for row in mine] == pytest.approx([float(row["logit"]) for row in kept], abs=1e-3)
    assert len(mine) == 12


def test_sentences(zoo: Zoo, models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    long = tmp_path / "long.fa"
    long.write_text(">l\n" + "ACGT" * 2000 + "\n")
    out = ("-o", tmp_path / "out")
    for name, arguments, words in [
        ("classes", ["--fasta", fasta, "--class", "ye", *out], "did you mean 'yes'?"),
        ("letters", ["--fasta", fasta, "--class", "yes", *out], "has no classes"),
        ("letters", ["--fasta", fasta, "--region", "on:1-3", *out], "did you mean 'one'?"),
        ("letters", ["--fasta", fasta, "--region", "one:1-30", *out], "within 1 to 16"),
        ("letters", ["--fasta", fasta, "--region", "one", *out], "NAME:START-END"),
        ("letters", ["--fasta", fasta, "--window", "500", *out], "at most 129"),
        ("letters", ["--fasta", long, *out], "at most 5,000"),
        ("letters", ["--fasta", fasta, "-o", full], "is not an empty folder"),
        ("letters", ["--fasta", fasta, "-o", tmp_path / "no" / "out"], "does not exist"),
        ("letters", ["--fasta", tmp_path / "no.fa", *out], "does not exist"),
    ]:
        status, shown, err = zoo("mutagenesis", models[name], *arguments)
        assert (status, shown) == (2, ""), err
        assert words in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in.fa", "long.fa"]
