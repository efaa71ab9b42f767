"""`zoo quickstart`: the whole line once, on real DNA that ships with the zoo. `make demo` runs it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, table, write_rows
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.train.run import RunResult

PRETRAIN, FINETUNE, DATA = "hyenadna_chr20_pretrain", "hyenadna_uci_splice", "uci_splice"
SEQUENCES = 12  # of the test split, in the FASTA file of the last part

# Others on the same splits. Bits per base: counts on the training part, the order-k model interpolated over k = 0..9.
# Splice junctions: logistic regression on one-hot bases, three convolutions with 57,000 parameters whose epoch was
# chosen on the dev split, and the best published result of the StatLog project (radial basis functions).
MARKOV = (("single bases (order 0)", 1.969), ("best Markov model (order 9)", 1.798))
SPLICE = (("logistic regression", 95.6, 0.929), ("small CNN", 96.3, 0.940), ("StatLog RBF (published)", 95.9, None))


def parser() -> Parser:
    command = Parser(
        "quickstart",
        "Pretrain a small HyenaDNA on a slice of human chromosome 20, fine-tune it on splice junctions, measure it on\n"
        "the test split, save, load and verify the artifact, and predict on a FASTA file. About 5 minutes on 2 cores.",
        ["zoo quickstart", "zoo quickstart --out demo-run", "zoo quickstart --steps 20 --out /tmp/look"],
    )
    command.add_argument(
        "-o", "--out", default="demo-run", metavar="DIR", help="new folder for it all (default: demo-run)"
    )
    command.add_argument("--steps", type=int, metavar="N", help="optimiser steps of each training, for a quick look")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.train.compose import compose
    from zoo.train.recipe import validate

    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"'{out}' exists and is not empty: choose another folder with --out, or remove it")
    if args.steps is not None and args.steps < 1:
        raise ZooError(f"--steps must be at least 1, got {args.steps}")
    changes = [] if args.steps is None else [f"trainer.max_steps={args.steps}", "trainer.val_every=0"]
    pretraining = validate(compose(PRETRAIN, changes))
    finetuning = validate({**compose(FINETUNE, changes), "init": str(out / "1-pretrain" / "artifact")})
    began = time.monotonic()
    from zoo.train.run import train

    step(1, f"pretrain on human chromosome 20 (recipe {PRETRAIN})")
    first = train(pretraining, out / "1-pretrain")
    step(2, f"fine-tune on splice junctions from those weights (recipe {FINETUNE})")
    second = train(finetuning, out / "2-splice")
    step(3, "load the artifact back, verify it, measure it again, predict on a FASTA file")
    check(second)
    fasta, predictions = predict(second.artifact, out)
    seconds = time.monotonic() - began
    print(f"\n{report(first, second)}\n\ntook {seconds:.0f} s in all\n{places(second, fasta, predictions)}")
    return 0


def step(number: int, text: str) -> None:
    """The headline of a part."""
    print(f"\n[{number}/3] {text}", flush=True)


def check(result: RunResult) -> None:
    """Files, parity and metrics of the saved artifact.

    Raises:
        ZooError: what was loaded is not what was trained.
    """
    from zoo.cli.evaluate import data_section, evaluate
    from zoo.hub import artifact

    checks = artifact.verify(result.artifact)
    for item in checks:
        print(f"verify    {item.name}: {item.error:.1e}, {item.ratio:.3f} of the tolerance")
    if not all(item.passed for item in checks):
        raise ZooError(f"'{result.artifact}' does not reproduce its own outputs")
    again = evaluate(artifact.load(result.artifact), data_section(DATA, []), "test")
    for name in ("test/accuracy", "test/mcc"):
        print(f"measure   {name} {again[name]:.4f} (in the run: {result.metrics[name]:.4f})")
        if abs(again[name] - result.metrics[name]) > 5e-3:
            raise ZooError(
                f"{name} of the loaded artifact differs from the run's: {again[name]}, {result.metrics[name]}"
            )


def predict(ref: Path, out: Path) -> tuple[Path, Path]:
    """Write some test sequences as FASTA, predict them; returns both files."""
    from zoo.cli.predict import predict as predict_sequences
    from zoo.datamodules.fasta import read_fasta
    from zoo.hub import artifact

    fasta, predictions = out / "test_sequences.fa", out / "predictions.tsv"
    rows = some_rows()
    fasta.write_text("".join(f">junction{i + 1} {label}\n{text}\n" for i, (text, label) in enumerate(rows)), "utf-8")
    records = list(read_fasta(fasta))
    names = [header.split()[0] for header, _ in records]
    header, lines = predict_sequences(artifact.load(ref), names, [sequence for _, sequence in records], len(records))
    write_rows(lines, header, str(predictions))
    shown = [(line[0], label, *line[1:]) for line, (_, label) in zip(lines, rows, strict=True)]
    right = sum(line[1] == label for line, (_, label) in zip(lines, rows, strict=True))
    print(f"\n{table(shown[:6], ('sequence', 'is', *header[1:]))}\n{right} of {len(rows)} right in {predictions}")
    return fasta, predictions


def some_rows() -> list[tuple[str, str]]:
    """(sequence, label) of some test sequences, the classes taking turns."""
    from zoo import datamodules
    from zoo.datamodules.manifest import locate
    from zoo.datamodules.table import read_table

    section = datamodules.section(DATA)
    classes = section["classes"]
    found = read_table(locate(section["test"]["path"]))
    labels = [classes[int(index)] for index in found.columns["label"]]  # the file holds the classes' numbers
    pairs = list(zip(found.columns["sequence"], labels, strict=True))
    each = SEQUENCES // len(classes)
    chosen = [[pair for pair in pairs if pair[1] == name][:each] for name in classes]
    return [pair for turn in zip(*chosen, strict=True) for pair in turn]


def report(first: RunResult, second: RunResult) -> str:
    """Both results beside what others reach on the same splits."""
    bits = first.metrics["test/bits_per_base"]
    genome = [(name, f"{value:.3f}") for name, value in MARKOV] + [("this HyenaDNA", f"{bits:.3f}")]
    own = ("this HyenaDNA", 100 * second.metrics["test/accuracy"], second.metrics["test/mcc"])
    splice = [(name, f"{hits:.1f}", "-" if mcc is None else f"{mcc:.3f}") for name, hits, mcc in (*SPLICE, own)]
    return "\n\n".join(
        [
            table(genome, ("chromosome 20, test part", "bits per base (less is better)"), right=(1,)),
            table(splice, ("splice junctions, test split", "accuracy %", "MCC"), right=(1, 2)),
        ]
    )


def places(result: Any, fasta: Path, predictions: Path) -> str:
    """Where everything is."""
    rows = [
        ("artifact", result.artifact),
        ("card", result.artifact / "README.md"),
        ("curves", result.dir / "curves.png"),
        ("", result.dir.parent / "1-pretrain" / "curves.png"),
        ("sequences", fasta),
        ("predictions", predictions),
    ]
    return "\n".join(f"{name:<12}{path}" for name, path in rows)
