"""Predictions for sequences outside any data set: names and letters in, one row (or one a token) out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.datamodules.augment import reverse_complement
from zoo.datamodules.token_labels import covering
from zoo.errors import ZooError
from zoo.tasks.strands import BOTH, at, both_strands, merged
from zoo.tokenizers.base import to_bytes
from zoo.train.evaluate import opened

Row = dict[str, Any]
Text = bytes | tuple[bytes, bytes]  # a sequence, or the two of a pair
CHUNK = 4096  # sequences sorted by length together


def predict(
    ref: Any,
    sequences: Iterable[tuple[str, Any]],
    *,
    batch_size: int = 256,
    batch_tokens: int = 32768,
    device: str | torch.device | None = None,
) -> Iterator[Row]:
    """Rows for (name, sequence) pairs, in their order; sequences of similar length share a batch.

    A classifier gives `name`, `prediction` and one probability a class (a `token` head: one row a token, or a base
    where it was trained on single bases, with its `start` and `end` in the sequence); regression gives the numbers; a
    language model gives `tokens`, `bases` (how many bases were predicted), and their mean `log_likelihood` (natural
    logarithm) and `bits_per_base`. Where training asked for it (`task.rc`) both strands are read. Of a masked
    language model these are `pseudo_...`: each token given all others, one pass a token.

    Args:
        ref: folder, catalogue name, Hub id, or a loaded artifact.
        sequences: pairs of name and letters (of both sequences, for a model of pairs); read lazily.
        batch_size: most sequences in a batch.
        batch_tokens: most tokens in a batch, padding included (a longer sequence goes alone).
        device: where to compute; None takes a GPU if there is one.

    Raises:
        ZooError: an empty sequence, one longer than the model takes (both numbers are named), or one sequence where
            the model was trained on pairs.
    """
    artifact = opened(ref)
    if getattr(getattr(artifact.model.config, "head", None), "kind", None) == "lm":
        yield from _likelihoods(artifact, sequences, batch_size, batch_tokens, device)
        return
    predictor = Predictor(artifact, device)
    stream = iter(sequences)
    while chunk := list(islice(stream, CHUNK)):
        yield from predictor.rows(chunk, batch_size, batch_tokens)


class Predictor:
    """A model with a head for classes or targets in evaluation mode, and its tokenizer.

    Attributes:
        head: the head's config.
        kind: what the outputs are: multiclass, multilabel or regression.
        second: the column of the second sequence in training, None for a model of single sequences.
        max_len, truncate: most tokens that training read of a sequence (None: all), and the side from which longer ones
            were cut, or `error` where they were refused.
        classes: their names.

    Raises:
        ZooError: the artifact holds no tokenizer.
    """

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
        self.add_special = bool(data.get("add_special", data.get("add_eos", True)))
        self.pad_side = data.get("pad_side")
        self.pad_to = data.get("pad_to")
        self.max_len, self.truncate = data.get("max_len"), data.get("truncate", "error")
        self.path, self.second = artifact.path, data.get("sequence2")
        self.rc = artifact.recipe.get("task", {}).get("rc", "none")
        self.frames = int(data.get("frames", 1))
        self.per_base = bool(data.get("per_base", False))
        self.head = artifact.model.config.head
        self.kind = artifact.info.get("outputs", {}).get("task_kind", "multiclass")
        self.classes = artifact.classes or [str(i) for i in range(self.head.num_outputs)]

    def logits(self, texts: list[Any]) -> tuple[Tensor, Tensor]:
        """What the head says of texts (float32, the head's shape), and which tokens are real [B, L].

        A model that was trained to be read on both strands (`task.rc`) or in several frames of its words
        (`data.frames`) says it of all of them together; a `token` head reads both strands only in `base_logits`,
        since the tokens of the two strands differ.
        """
        logits, mask = self._logits(texts)
        if self.head.kind != "sequence":
            return logits, mask
        strands = [texts, [_turned(text) for text in texts]] if self.rc in BOTH else [texts]
        views = [[text[skip:] or text for text in strand] for strand in strands for skip in range(self.frames)]
        return merged([logits, *(self._logits(view)[0] for view in views[1:])], self.rc, self._kind), mask

    @property
    def _kind(self) -> str:
        return self.kind if self.kind in ("multilabel", "regression") else "multiclass"

    def base_logits(self, texts: list[bytes]) -> list[tuple[np.ndarray, Tensor]]:
        """For each text the bases that some token covers [n], and what a `token` head says of them [n, K]."""
        strands = [self._bases(texts)]
        if self.rc in BOTH:
            turned = self._bases([reverse_complement(text) for text in texts])
            strands.append([(covered[::-1], logits.flip(0)) for covered, logits in turned])
        found = []
        for i, (covered, logits) in enumerate(strands[0]):
            if len(strands) == 2:
                known = torch.from_numpy(strands[1][i][0].copy())
                logits = both_strands(logits, strands[1][i][1], self.rc, self._kind, known)
            found.append((np.flatnonzero(covered), logits[torch.from_numpy(covered)]))
        return found

    def _bases(self, texts: list[bytes]) -> list[tuple[np.ndarray, Tensor]]:
        """For each text which bases are covered [N], and logits of all of them [N, K] on the CPU."""
        logits, mask = self._logits(texts)
        frame = (len(self.tokenizer.prefix), len(self.tokenizer.suffix)) if self.add_special else (0, 0)
        found = []
        for row, text in enumerate(texts):
            spans = self.tokenizer.offsets(text, add_special=False)
            token, place = covering(spans, len(text), mask[row].cpu().numpy(), *frame, self.truncate)
            where, inside = (torch.from_numpy(part)[None] for part in (token, place))
            found.append((token >= 0, at(logits[row : row + 1].cpu(), where, inside)[0]))
        return found

    @torch.inference_mode()
    def _logits(self, texts: list[Any]) -> tuple[Tensor, Tensor]:
        if self.second is None:
            ids, valid = self.tokenizer.encode_batch(
                texts, self.max_len, self.pad_side, add_special=self.add_special, pad_to=self.pad_to,
                truncate=self.truncate,
            )  # fmt: skip
        else:
            rows = self._pairs(texts)
            counts = np.array([len(row) for row in rows], np.int64)
            ids, valid = self.tokenizer.assemble(
                np.concatenate(rows), counts, self.max_len, self.pad_side, add_special=False, pad_to=self.pad_to,
                truncate=self.truncate,
            )  # fmt: skip
        mask = torch.from_numpy(valid).to(self.device)
        return self.model(torch.from_numpy(ids).to(self.device), mask).float(), mask

    def _pairs(self, texts: list[Any]) -> list[np.ndarray]:
        """Ids of pairs with their special tokens, as training read them."""
        for text in texts:
            if not isinstance(text, tuple):
                raise ZooError(
                    f"{self.path} was trained on pairs of sequences (data.sequence2={self.second}): give it both, "
                    "with `zoo predict --csv FILE --column2 NAME`"
                )
        return [self.tokenizer.encode_pair(*text)[0] for text in texts]

    def _clean(self, name: str, text: Any) -> Text:
        """The text as training read it, of a pair both."""
        if isinstance(text, tuple):
            if self.second is None:
                raise ZooError(f"{self.path} reads single sequences, but '{name}' is a pair")
            one, two = (self._clean(name, part) for part in text)
            return one, two  # type: ignore[return-value]
        raw = b"".join(to_bytes(text).split())
        if not raw:
            raise ZooError(f"sequence '{name}' is empty")
        return raw.upper() if self.upper else raw

    def rows(self, chunk: list[tuple[str, Any]], batch_size: int, batch_tokens: int) -> Iterator[Row]:
        texts: list[Any] = [self._clean(name, text) for name, text in chunk]
        if self.second is None:
            lengths = self.tokenizer.counts(texts, self.add_special)
        else:
            lengths = np.array([len(row) for row in self._pairs(texts)], np.int64)
        if self.max_len is not None and self.truncate != "error":  # cut as in training
            lengths = np.minimum(lengths, self.max_len)
        elif self.max_len is not None and int(lengths.max()) > self.max_len:
            worst = int(lengths.argmax())
            raise ZooError(
                f"sequence '{chunk[worst][0]}' has {int(lengths[worst])} tokens, more than the data.max_len="
                f"{self.max_len} that {self.path} was trained with: cut it into windows"
            )
        limit = getattr(self.model, "max_len", None)
        if limit is not None and int(lengths.max()) > limit:
            worst = int(lengths.argmax())
            raise ZooError(
                f"sequence '{chunk[worst][0]}' has {int(lengths[worst])} tokens but the model takes at most {limit}: "
                "cut it into windows"
            )
        out: list[list[Row]] = [[] for _ in chunk]
        for batch in batches(lengths, batch_size, batch_tokens):
            results = self._batch([chunk[i][0] for i in batch], [texts[i] for i in batch])
            for place, result in zip(batch, results, strict=True):
                out[place] = result
        for result in out:
            yield from result

    def _batch(self, names: list[str], texts: list[Any]) -> list[list[Row]]:
        if self.head.kind == "token" and (self.per_base or self.rc in BOTH):
            return [
                [
                    {"name": name, "start": int(base), "end": int(base) + 1, **self._row(scores)}
                    for base, scores in zip(bases, self._scores(logits), strict=True)
                ]
                for name, (bases, logits) in zip(names, self.base_logits(texts), strict=True)
            ]
        logits, mask = self.logits(texts)
        scores = self._scores(logits).cpu()
        if self.head.kind == "sequence":
            return [[{"name": name, **self._row(row)}] for name, row in zip(names, scores, strict=True)]
        found = []
        for name, text, row, kept in zip(names, texts, scores, mask.cpu(), strict=True):
            spans = self._kept(self.tokenizer.offsets(text, self.add_special), int(kept.sum()))
            tokens_of = zip(spans, row[kept], strict=True)
            found.append(
                [{"name": name, "start": int(a), "end": int(b), **self._row(r)} for (a, b), r in tokens_of if b > a]
            )
        return found

    def _kept(self, spans: np.ndarray, count: int) -> np.ndarray:
        """Spans of a text's tokens without those that were cut off to leave *count*; special tokens stay."""
        before, behind = (len(self.tokenizer.prefix), len(self.tokenizer.suffix)) if self.add_special else (0, 0)
        inner, end = spans[before : len(spans) - behind], len(spans) - behind
        inner = inner[len(spans) - count :] if self.truncate == "left" else inner[: count - before - behind]
        return np.concatenate([spans[:before], inner, spans[end:]])

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
        return {"prediction": predicted, **{f"p_{c}": v for c, v in zip(self.classes, values, strict=True)}}


def _turned(text: Text) -> Text:
    """The reverse complement of a sequence, or of both of a pair."""
    return tuple(map(reverse_complement, text)) if isinstance(text, tuple) else reverse_complement(text)  # type: ignore[return-value]


def _likelihoods(artifact: Any, sequences: Any, batch_size: int, batch_tokens: int, device: Any) -> Iterator[Row]:
    from zoo.train.embed import Reader, score

    reader = Reader(artifact, device)
    kind = "" if reader.causal else "pseudo_"
    tokens = min(batch_tokens, reader.batch_tokens)
    for one in score(reader, sequences, batch_size=batch_size, batch_tokens=tokens):
        bases = int(one.bases.sum())
        mean = one.total / bases if bases else math.nan
        scores = {f"{kind}log_likelihood": mean, f"{kind}bits_per_base": -mean / math.log(2)}
        yield {"name": one.name, "tokens": len(one.tokens), "bases": bases, **scores}


def batches(lengths: np.ndarray, size: int, budget: int) -> Iterator[list[int]]:
    """Places of sequences, longest first, cut so that a padded batch holds at most *size* rows of *budget* tokens."""
    batch: list[int] = []
    for place in np.argsort(-lengths, kind="stable"):
        if batch and (len(batch) == size or (len(batch) + 1) * int(lengths[batch[0]]) > budget):
            yield batch
            batch = []
        batch.append(int(place))
    if batch:
        yield batch


def by_length(rows: Sequence[np.ndarray], size: int, budget: int) -> Iterator[list[int]]:
    """`batches` of rows of ids."""
    yield from batches(np.array([len(row) for row in rows], np.int64), size, budget)
