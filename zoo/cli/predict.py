"""`zoo predict`: what an artifact says of each sequence of a file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, existing_file, write_rows
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.hub.artifact import Artifact

Rows = list[list[str]]


def parser() -> Parser:
    command = Parser(
        "predict",
        "One line for each sequence: class and probabilities, targets, or bits per base of a language model.\n"
        "Tab-separated on stdout, or in the file --out (comma-separated where its name ends in .csv).",
        [
            "zoo predict runs/hyenadna_uci_splice/artifact --fasta sequences.fa",
            "zoo predict runs/hyenadna_uci_splice/artifact --csv table.csv --column seq --out predictions.csv",
            "zoo predict hyenadna-tiny-1k --fasta sequences.fa",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--fasta", metavar="FILE", help="sequences, plain or gzip-compressed")
    source.add_argument("--csv", metavar="FILE", help="table with a column of sequences (.csv or .tsv)")
    command.add_argument("--column", default="sequence", help="that column (default: sequence)")
    command.add_argument("--out", metavar="FILE", help="write there rather than to stdout")
    command.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: 32)")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.cli.finetune import check_ref

    check_ref(args.ref)
    if args.batch_size < 1:
        raise ZooError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.out is not None and not Path(args.out).expanduser().parent.is_dir():
        raise ZooError(f"folder '{Path(args.out).parent}' of --out does not exist")
    names, sequences = read(args)
    from zoo.hub import artifact

    header, rows = predict(artifact.load(args.ref), names, sequences, args.batch_size)
    write_rows(rows, header, args.out)
    return 0


def read(args: argparse.Namespace) -> tuple[list[str], list[bytes]]:
    """Names and sequences of the input file.

    Raises:
        ZooError: missing, empty, of another format, or without the column.
    """
    if args.fasta is not None:
        from zoo.datamodules.fasta import read_fasta

        records = list(read_fasta(existing_file(args.fasta, "FASTA file")))
        names = [header.split()[0] if header.split() else f"sequence_{i + 1}" for i, (header, _) in enumerate(records)]
        sequences = [sequence for _, sequence in records]
        place = args.fasta
    else:
        from zoo.datamodules.table import read_table

        found = read_table(existing_file(args.csv, "table"))
        sequences = [text.strip().encode("latin-1", "replace") for text in found.column(args.column, "--column")]
        labels = next((found.columns[key] for key in ("id", "name") if key in found.columns), None)
        names = labels or [str(i + 1) for i in range(len(sequences))]
        place = args.csv
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise ZooError(f"sequence '{name}' of '{place}' is empty")
    return names, sequences


def predict(found: Artifact, names: list[str], sequences: list[bytes], batch_size: int) -> tuple[list[str], Rows]:
    """(header, rows) in the order of the input.

    Raises:
        ZooError: no tokenizer, or a sequence longer than the model takes; names both numbers.
    """
    tokenizer, model = found.tokenizer, found.model
    if tokenizer is None:
        raise ZooError("this artifact has no tokenizer, so it cannot read sequences")
    settings = found.recipe.get("data", {})
    special = bool(settings.get("add_special", settings.get("add_eos", True)))
    if settings.get("upper"):
        sequences = [sequence.upper() for sequence in sequences]
    counts = tokenizer.counts(sequences, special)
    limit = getattr(model, "max_len", None)
    if limit is not None:
        for name, count in zip(names, counts, strict=True):
            if count > limit:
                raise ZooError(f"sequence '{name}' has {count} tokens but the model takes at most {limit} (max_len)")
    order = sorted(range(len(sequences)), key=lambda i: int(counts[i]))
    side = settings.get("pad_side")
    rows: dict[int, Rows] = {}
    header: list[str] = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, valid = tokenizer.encode_batch([sequences[i] for i in chosen], None, side, special)
        header, made = _batch(found, ids, valid, special)
        for i, lines in zip(chosen, made, strict=True):
            rows[i] = [[names[i], *line] for line in lines]
    return ["name", *header], [line for i in sorted(rows) for line in rows[i]]


def _batch(found: Artifact, ids: Any, valid: Any, special: bool) -> tuple[list[str], list[Rows]]:
    """Header and lines of one batch, without the names."""
    import torch

    tokens, mask = torch.from_numpy(ids), torch.from_numpy(valid)
    with torch.inference_mode():
        logits = found.model(tokens, mask).float()
    if found.model.head_kind == "lm":
        return ["tokens", "bases", "bits_per_base"], list(_language(found, logits, tokens, mask))
    header, lines = _labels(found, logits)
    if found.model.head_kind == "sequence":
        return header, [[line] for line in lines]
    length = tokens.shape[1]
    kept = [[[str(p), *lines[b * length + p]] for p in range(length) if mask[b, p]] for b in range(len(tokens))]
    return ["token", *header], kept


def _language(found: Artifact, logits: Tensor, ids: Tensor, valid: Tensor) -> Iterator[Rows]:
    import torch
    import torch.nn.functional as F

    from zoo.train.assemble import bases_of

    weight = torch.tensor(bases_of(found.tokenizer))
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # [B, L-1]
    bases = weight[ids[:, 1:]] * (valid[:, 1:] & valid[:, :-1])
    for row in range(len(ids)):
        total = int(bases[row].sum())
        bits = float((nats[row] * (bases[row] > 0)).sum()) / math.log(2) / total if total else math.nan
        yield [[str(int(valid[row].sum())), str(total), f"{bits:.4f}"]]


def _labels(found: Artifact, logits: Tensor) -> tuple[list[str], Rows]:
    """Header and one line for each row of logits [N, K] (or [B, L, K], flattened)."""
    flat = logits.reshape(-1, logits.shape[-1])
    kind = found.info.get("outputs", {}).get("task_kind") or "multiclass"
    classes = found.classes or [f"output_{i}" for i in range(flat.shape[1])]
    if kind == "regression":
        return classes, [[f"{value:.6g}" for value in row] for row in flat.tolist()]
    scores = flat.sigmoid() if kind == "multilabel" else flat.softmax(-1)
    header = ["prediction", *(f"p_{name}" for name in classes)]
    lines = []
    for row in scores.tolist():
        if kind == "multilabel":
            chosen = [name for name, score in zip(classes, row, strict=True) if score >= 0.5]
        else:
            chosen = [classes[row.index(max(row))]]
        lines.append([";".join(chosen), *(f"{value:.4f}" for value in row)])
    return header, lines
