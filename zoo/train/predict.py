"""Predictions for sequences outside any data set: FASTA or CSV in, one row (or one a token) out."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.train.assemble import bases_of
from zoo.train.evaluate import opened

Row = dict[str, Any]
CHUNK = 4096  # sequences sorted by length together


def read_fasta(path: str | Path) -> Iterator[tuple[str, str]]:
    """(first word of the header, sequence) of each record.

    Raises:
        ZooError: missing, empty, or not FASTA.
    """
    from zoo.datamodules import fasta

    for number, (header, sequence) in enumerate(fasta.read_fasta(path), 1):
        yield (header.split() or [str(number)])[0], sequence.decode("latin-1")


def read_csv(path: str | Path, column: str = "sequence", id_column: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, sequence) of each row of a CSV or TSV; the id is *id_column*, or `id` if there is one, or the row number.

    Raises:
        ZooError: missing, not a table, or without that column.
    """
    from zoo.datamodules.table import read_table

    place = Path(path)
    if not place.is_file():
        raise ZooError(f"'{place}' does not exist")
    table = read_table(place)
    sequences = table.column(column, "the sequences")
    names = id_column or ("id" if "id" in table.columns else None)
    ids = table.column(names, "the ids") if names else [str(row + 1) for row in range(len(table))]
    yield from zip(ids, sequences, strict=True)


def predict(
    ref: Any,
    sequences: Iterable[tuple[str, str]],
    *,
    batch_tokens: int = 32768,
    device: str | torch.device | None = None,
) -> Iterator[Row]:
    """Rows for (id, sequence) pairs, in their order; sequences of similar length share a batch.

    A classifier gives `id`, `predicted` and one probability a class (a `token` head: one row a token with its
    `start` and `end` in the sequence); regression gives the numbers; a language model gives `bases`, the number of
    bases predicted, and `log_likelihood_per_base` (natural logarithm).

    Args:
        ref: folder, catalogue name, Hub id, or a loaded artifact.
        sequences: pairs of id and letters; read lazily.
        batch_tokens: most tokens in a batch, padding included (a longer sequence goes alone).
        device: where to compute; None takes a GPU if there is one.

    Raises:
        ZooError: an empty sequence, or one longer than the model takes (both numbers are named).
    """
    predictor = _Predictor(opened(ref), device)
    stream = iter(sequences)
    while chunk := list(islice(stream, CHUNK)):
        yield from predictor.rows(chunk, batch_tokens)


def write_tsv(rows: Iterable[Row], stream: TextIO) -> int:
    """Write rows as tab-separated values with a header; returns how many."""
    writer: Any = None
    count = 0
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(stream, list(row), delimiter="\t", lineterminator="\n")
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        count += 1
    return count


class _Predictor:
    def __init__(self, artifact: Any, device: str | torch.device | None) -> None:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device if device is not None else found)
        self.model: nn.Module = artifact.model.to(self.device).eval()
        self.tokenizer = artifact.tokenizer
        if self.tokenizer is None:
            raise ZooError(f"{artifact.path} holds no tokenizer, so it cannot read sequences")
        data = artifact.recipe.get("data", {})
        # what training did to a sequence before the model saw it
        self.upper = bool(data.get("upper", False))
        self.add_special = bool(data.get("add_special", True))
        self.pad_side = data.get("pad_side")
        self.pad_to = data.get("pad_to")
        self.head = artifact.model.config.head
        self.kind = artifact.info.get("outputs", {}).get("task_kind", "multiclass")
        self.classes = artifact.classes or [str(i) for i in range(self.head.num_outputs)]
        self.bases = torch.tensor(bases_of(self.tokenizer), device=self.device) if self.head.kind == "lm" else None

    def rows(self, chunk: list[tuple[str, str]], batch_tokens: int) -> Iterator[Row]:
        texts = [text.strip().upper() if self.upper else text.strip() for _, text in chunk]
        for (name, _), text in zip(chunk, texts, strict=True):
            if not text:
                raise ZooError(f"sequence '{name}' is empty")
        lengths = self.tokenizer.counts(texts, self.add_special)
        limit = getattr(self.model, "max_len", None)
        if limit is not None and int(lengths.max()) > limit:
            worst = int(lengths.argmax())
            raise ZooError(
                f"sequence '{chunk[worst][0]}' has {int(lengths[worst])} tokens but the model takes at most {limit}: "
                "cut it into windows"
            )
        out: list[list[Row]] = [[] for _ in chunk]
        for batch in _batches(lengths, batch_tokens):
            results = self._batch([chunk[i][0] for i in batch], [texts[i] for i in batch])
            for place, result in zip(batch, results, strict=True):
                out[place] = result
        for result in out:
            yield from result

    @torch.inference_mode()
    def _batch(self, names: list[str], texts: list[str]) -> list[list[Row]]:
        ids, valid = self.tokenizer.encode_batch(
            texts, None, self.pad_side, add_special=self.add_special, pad_to=self.pad_to
        )
        tokens = torch.from_numpy(ids).to(self.device)
        mask = torch.from_numpy(valid).to(self.device)
        logits = self.model(tokens, mask).float()
        if self.head.kind == "lm":
            return self._likelihoods(names, logits, tokens, mask)
        scores = self._scores(logits).cpu()
        if self.head.kind == "sequence":
            return [[{"id": name, **self._row(row)}] for name, row in zip(names, scores, strict=True)]
        found = []
        for name, text, row, kept in zip(names, texts, scores, mask.cpu(), strict=True):
            spans = self.tokenizer.offsets(text, self.add_special)
            tokens_of = zip(spans, row[kept], strict=True)
            found.append(
                [{"id": name, "start": int(a), "end": int(b), **self._row(r)} for (a, b), r in tokens_of if b > a]
            )
        return found

    def _scores(self, logits: Tensor) -> Tensor:
        if self.kind == "regression":
            return logits
        return torch.sigmoid(logits) if self.kind == "multilabel" else logits.softmax(-1)

    def _row(self, scores: Tensor) -> Row:
        values = [float(value) for value in scores]
        if self.kind == "regression":
            return dict(zip(self.classes, values, strict=True))
        if self.kind == "multilabel":
            predicted = ";".join(name for name, value in zip(self.classes, values, strict=True) if value >= 0.5)
        else:
            predicted = self.classes[int(np.argmax(values))]
        return {"predicted": predicted, **{f"p_{c}": v for c, v in zip(self.classes, values, strict=True)}}

    def _likelihoods(self, names: list[str], logits: Tensor, ids: Tensor, mask: Tensor) -> list[list[Row]]:
        assert self.bases is not None
        targets = ids[:, 1:]
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # [B, L-1]
        bases = self.bases[targets] * (mask[:, 1:] & mask[:, :-1])
        totals, counts = (chosen.double() * (bases > 0)).sum(1).tolist(), bases.sum(1).tolist()
        return [
            [{"id": name, "bases": count, "log_likelihood_per_base": total / count if count else float("nan")}]
            for name, total, count in zip(names, totals, counts, strict=True)
        ]


def _batches(lengths: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Places of sequences, longest first, cut so that a padded batch holds at most *budget* tokens."""
    batch: list[int] = []
    for place in np.argsort(-lengths, kind="stable"):
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(int(place))
    if batch:
        yield batch
