"""Tokenizers and genome loading in MB of bases a second on one core, each beside what it replaces.

    python benchmarks/tokenizer_speed.py [--bases 8000000] [--repeats 5]

Character and k-mer tokenizers run beside Python loops over dictionaries that give the same ids (checked); BPE beside
Hugging Face `tokenizers.encode_batch` alone; the genome loader beside the 50 MB/s a fast model consumes. Times are CPU
seconds of this process, the least of the repeats counts. Writes results/tokenizer_speed.json.
(It is not called tokenizers.py because scripts beside it could then no longer import the library of that name.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # one core for the BPE library too
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

import zoo.datamodules as datamodules
import zoo.tokenizers as catalogue
from zoo.tokenizers.char import CharTokenizer
from zoo.tokenizers.kmer import KmerTokenizer

RESULTS = Path(__file__).parent / "results"
TARGETS = {"char, one text": 100, "char, batch of 1,000 bp": 100, "6-mer, one text": 100, "6-mer, batch of 996 bp": 100}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of a call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def char_loop(text: str, table: dict[str, int], unknown: int) -> list[int]:
    """A character tokenizer as it is usually written."""
    ids = []
    for letter in text:
        ids.append(table.get(letter, unknown))
    return ids


def kmer_loop(text: str, table: dict[str, int], k: int) -> list[int]:
    """A k-mer tokenizer as it is usually written."""
    ids = []
    for start in range(0, len(text), k):
        ids.append(table.get(text[start : start + k], 0))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", type=int, default=8_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    size = args.bases // 6000 * 6000
    text = rng.choice(np.frombuffer(b"ACGT", np.uint8), size).tobytes().decode()
    mixed = rng.choice(np.frombuffer(b"ACGTACGTACGTacgtN", np.uint8), size // 10).tobytes().decode()
    small = text[: size // 8]
    rows: list[dict[str, Any]] = []

    def add(
        name: str, bases: int, ours: float, other: float | None = None, other_bases: int = 0, beside: str = ""
    ) -> None:
        row: dict[str, Any] = {"what": name, "mb_per_s": bases / ours / 1e6, "target": TARGETS.get(name)}
        line = f"{name:34} {row['mb_per_s']:8.1f} MB/s"
        if other is not None:
            row |= {"beside": beside, "beside_mb_per_s": other_bases / other / 1e6}
            row["ratio"] = row["mb_per_s"] / row["beside_mb_per_s"]
            line += f"   {beside} {row['beside_mb_per_s']:7.2f} MB/s = {row['ratio']:.2f}x"
        if row["target"]:
            line += f"   ({row['mb_per_s'] / row['target']:.1f}x the target of {row['target']} MB/s)"
        rows.append(row)
        print(line, flush=True)

    def batch_of(width: int) -> list[str]:
        return [text[i : i + width] for i in range(0, len(text) - width + 1, width)]

    char, kmer = CharTokenizer(), KmerTokenizer()
    table = {token: i for i, token in enumerate(char.vocab)}
    loop = seconds(lambda: char_loop(small, table, 6), 3)
    assert char_loop(small, table, 6) == char.encode(small, add_special=False).tolist()
    name = "Python loop"
    add("char, one text", size, seconds(lambda: char.encode(text), args.repeats), loop, len(small), name)
    for width in (1000, 100):
        batch = batch_of(width)
        spent = seconds(lambda batch=batch: char.encode_batch(batch), args.repeats)
        add(f"char, batch of {width:,} bp", size, spent, loop, len(small), name)

    table = {token: i for i, token in enumerate(kmer.vocab)}
    loop = seconds(lambda: kmer_loop(small, table, 6), 3)
    assert kmer_loop(small, table, 6) == kmer.encode(small, add_special=False).tolist()
    add("6-mer, one text", size, seconds(lambda: kmer.encode(text), args.repeats), loop, len(small), name)
    for width in (996, 96):
        batch = batch_of(width)
        spent = seconds(lambda batch=batch: kmer.encode_batch(batch), args.repeats)
        add(f"6-mer, batch of {width} bp", len(batch) * width, spent, loop, len(small), name)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add("6-mer, soft-masked with N", len(mixed), seconds(lambda: kmer.encode(mixed), args.repeats))

    bpe = catalogue.from_catalogue("dna-bpe1024")
    batch = batch_of(1000)[:1000]
    bases = sum(map(len, batch))
    theirs = seconds(lambda: [row.ids for row in bpe.fast.encode_batch(batch)], args.repeats)  # type: ignore[attr-defined]
    ours = seconds(lambda: bpe.encode_batch(batch), args.repeats)
    add("BPE, ids and mask of 1,000 x 1,000", bases, ours, theirs, bases, "HF encode_batch")

    for length, size in ((1024, 16), (16384, 4)):
        data = datamodules.build(datamodules.section("chr20", length=length, batch_size=size, shift=100), char)
        loader = data.train_dataloader()
        bases = len(loader) * length * size
        spent = seconds(lambda loader=loader: [None for _ in loader], args.repeats)
        add(f"chr20 loader, {size} x {length:,}", bases, spent, 1.0, 50_000_000, "required")

    RESULTS.mkdir(exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    result = {"machine": machine, "bases": args.bases, "rows": rows}
    (RESULTS / "tokenizer_speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
