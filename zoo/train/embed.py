"""Reading sequences with a trained model outside any data set: hidden states, vectors, likelihoods of each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.heads import pool
from zoo.nn.layout import Layout
from zoo.tokenizers.base import to_bytes
from zoo.train.assemble import bases_of
from zoo.train.evaluate import opened
from zoo.train.predict import CHUNK, batches

POOLS = ("mean", "last", "first", "cls", "base")
Named = tuple[str, str | bytes]


class Reader:
    """A model in evaluation mode with its tokenizer, reading text as its training did.

    Attributes:
        causal: tokens are predicted from those before them.
        lm: the head is a distribution over the vocabulary.
        limit: most tokens the model takes, None when unbounded.
        batch_tokens: tokens, padding included, that are best read at a time.
        trained_length: bases of the windows it was trained on, None where that is not on record.

    Raises:
        ZooError: the artifact holds no tokenizer, or a model that does not read tokens or was trained on pairs.
    """

    def __init__(self, ref: Any, device: str | torch.device | None = None) -> None:
        artifact = opened(ref)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device if device is not None else found)
        # activations of more tokens than these leave a processor's cache, which costs more than small batches do
        self.batch_tokens = 8192 if self.device.type == "cpu" else 32768
        self.path = artifact.path
        self.model = artifact.model.to(self.device).eval()
        self.tokenizer = artifact.tokenizer
        if self.tokenizer is None:
            raise ZooError(f"{artifact.path} holds no tokenizer, so it cannot read sequences")
        if not hasattr(self.model, "forward_features") or not hasattr(self.model.config, "head"):
            raise ZooError(f"{artifact.path} holds a {type(self.model).__name__}, which does not read sequences")
        data = artifact.recipe.get("data", {})
        if data.get("sequence2") is not None:
            raise ZooError(
                f"{artifact.path} was trained on pairs of sequences (data.sequence2={data['sequence2']}), whose states "
                "are not those of one sequence: only `zoo predict --csv FILE --column2 NAME` reads it"
            )
        self.upper = bool(data.get("upper", False))
        self.add_special = bool(data.get("add_special", data.get("add_eos", True)))
        self.pad_side = data.get("pad_side")
        self.causal = self.model.layout_kind == "causal"
        self.lm = self.model.config.head.kind == "lm"
        self.limit: int | None = getattr(self.model, "max_len", None)
        self.trained_length: int | None = data.get("length")

    def prepare(self, text: str | bytes) -> bytes:
        """The text as training read it."""
        raw = to_bytes(text).strip()
        return raw.upper() if self.upper else raw

    def batches(self, names: Sequence[str], texts: Sequence[bytes], size: int, budget: int) -> Iterator[list[int]]:
        """Places of texts of similar length, at most *size* rows and *budget* tokens together.

        Raises:
            ZooError: an empty text, or one longer than the model takes (both numbers are named).
        """
        for name, text in zip(names, texts, strict=True):
            if not text:
                raise ZooError(f"sequence '{name}' is empty")
        lengths = self.tokenizer.counts(list(texts), self.add_special)
        if self.limit is not None and len(lengths) and int(lengths.max()) > self.limit:
            worst = int(lengths.argmax())
            raise ZooError(
                f"sequence '{names[worst]}' has {int(lengths[worst])} tokens but the model takes at most {self.limit}: "
                "cut it into windows"
            )
        yield from batches(lengths, size, budget)

    def encode(self, texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """ids, valid [B, L]."""
        ids, valid = self.tokenizer.encode_batch(texts, None, self.pad_side, add_special=self.add_special)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(valid).to(self.device)

    def pad(self, rows: Sequence[NDArray[np.int64]], side: str | None = None) -> tuple[Tensor, Tensor]:
        """ids, valid [B, L] of rows that are ids already, special tokens included; *side* as in `encode_batch`."""
        counts = np.array([len(row) for row in rows], np.int64)
        pad_side: Any = side or self.pad_side
        ids, valid = self.tokenizer.assemble(np.concatenate(rows), counts, None, pad_side, add_special=False)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(valid).to(self.device)

    def spans(self, text: bytes) -> NDArray[np.int64]:
        """[L, 2] letters that each token of `encode` stands for; (0, 0) for special tokens."""
        return self.tokenizer.offsets(text, self.add_special)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, valid: Tensor) -> Tensor:
        """States after the final norm, float32 [B, L, D]."""
        return self.model.forward_features(ids, Layout(self.model.layout_kind, valid=valid))[0].float()

    def require_lm(self) -> None:
        """Raise ZooError when the model gives no likelihoods."""
        if not self.lm:
            raise ZooError(
                f"{self.path} has a '{self.model.config.head.kind}' head and gives no likelihoods: "
                "take a language model"
            )

    @torch.inference_mode()
    def likelihoods(self, ids: Tensor, valid: Tensor, mask_every: int = 0) -> Tensor:
        """Log-likelihood of each token, [B, L] (natural logarithm); 0 at padding.

        Causal models: given the tokens before it, 0 for the first of each row. Others: given all tokens but itself
        (the pseudo-likelihood of Salazar et al. 2020, arXiv:1910.14659), which takes one pass a token; with
        *mask_every* N every N-th token is hidden at once, which takes N passes and is approximate.
        """
        if self.causal:
            logits = self.model(ids, valid)[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, L-1]
            known = valid[:, 1:] & valid[:, :-1]
            return torch.nn.functional.pad(chosen.masked_fill(~known, 0), (1, 0))
        out = torch.zeros(ids.shape, device=ids.device)
        place = valid.cumsum(1) - 1  # counted in each row, so that padding on the left changes nothing
        passes = int(place.max()) + 1
        passes = min(mask_every, passes) if mask_every else passes
        for turn in range(passes):
            out += self.masked(ids, valid, valid & (place % passes == turn))
        return out

    @torch.inference_mode()
    def masked(self, ids: Tensor, valid: Tensor, hide: Tensor) -> Tensor:
        """Log-likelihood [B, L] of the tokens where *hide* [B, L] is set, all of them masked at once; 0 elsewhere."""
        mask = self.tokenizer.special.get("mask")
        if mask is None:
            raise ZooError(f"the {self.tokenizer.name} tokenizer of {self.path} has no mask token")
        layout = Layout(self.model.layout_kind, valid=valid)
        hidden, _ = self.model.forward_features(ids.masked_fill(hide, mask), layout)
        law = self.model.forward_head(hidden[hide][None])[0].float().log_softmax(-1)  # [N, V]: hidden positions alone
        out = torch.zeros(ids.shape, device=ids.device)
        out[hide] = law.gather(-1, ids[hide][:, None])[:, 0]
        return out


@dataclass
class Scored:
    """Likelihoods of one sequence.

    Attributes:
        name: of the sequence.
        spans: [L, 2] letters of each token.
        tokens: log-likelihood of each token [L].
        bases: how many bases each scored token stands for [L]; 0 for tokens that are not scored.
        unread: letters that lie in no token of A, C, G, T alone: N and what else the tokenizer has no token for.
    """

    name: str
    spans: NDArray[np.int64]
    tokens: NDArray[np.float64]
    bases: NDArray[np.int64]
    unread: int = 0

    @property
    def total(self) -> float:
        """Log-likelihood of all bases together."""
        return float(self.tokens[self.bases > 0].sum())


def score(
    ref: Any,
    sequences: Iterable[Named],
    *,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    mask_every: int = 0,
    device: Any = None,
) -> Iterator[Scored]:
    """Likelihoods of (name, sequence) pairs in their order; see `Reader.likelihoods` for *mask_every*.

    Raises:
        ZooError: no language model, an empty sequence, or one longer than the model takes.
    """
    reader = ref if isinstance(ref, Reader) else Reader(ref, device)
    reader.require_lm()
    per_id = np.array(bases_of(reader.tokenizer))
    for names, texts in _chunks(reader, sequences):
        out: list[Scored | None] = [None] * len(texts)
        for batch in reader.batches(names, texts, batch_size, batch_tokens or reader.batch_tokens):
            ids, valid = reader.encode([texts[i] for i in batch])
            values, kept = reader.likelihoods(ids, valid, mask_every).double().cpu().numpy(), valid.cpu().numpy()
            for row, place in enumerate(batch):
                real = kept[row]
                bases = per_id[ids[row].cpu().numpy()[real]]
                unread = len(texts[place]) - int(bases.sum())
                if reader.causal:
                    bases[:1] = 0  # nothing comes before the first token
                out[place] = Scored(names[place], reader.spans(texts[place]), values[row][real], bases, unread)
        yield from (found for found in out if found is not None)


def embed(
    ref: Any,
    sequences: Iterable[Named],
    mode: str = "mean",
    *,
    batch_size: int = 256,
    batch_tokens: int | None = None,
    device: Any = None,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, vector [D]) of (name, sequence) pairs in their order; [letters, D] with mode `base`.

    Args:
        ref: folder, catalogue name, Hub id, a loaded artifact, or a Reader.
        sequences: pairs of name and letters; read lazily.
        mode: `mean`, `last` or `first` of the tokens that are no padding, `cls` the token before the text, or `base`:
            for each letter the state of the token it belongs to (0 for letters in no token).
        batch_size, batch_tokens: most rows, and most tokens with padding, at a time; None: what suits the device.
        device: where to compute; None takes a GPU if there is one.

    Raises:
        ZooError: an unknown mode, `cls` without such a token, an empty sequence, or one longer than the model takes.
    """
    if mode not in POOLS:
        raise ZooError(f"unknown pooling '{mode}' (known: {', '.join(POOLS)})")
    reader = ref if isinstance(ref, Reader) else Reader(ref, device)
    if mode == "cls":
        if not reader.add_special or reader.tokenizer.special.get("cls") not in reader.tokenizer.prefix[:1]:
            raise ZooError(
                f"the {reader.tokenizer.name} tokenizer of {reader.path} puts no [CLS] token before a text: "
                "take the mean, the last or the first token"
            )
        mode = "first"
    for names, texts in _chunks(reader, sequences):
        out: list[NDArray[np.float32] | None] = [None] * len(texts)
        for batch in reader.batches(names, texts, batch_size, batch_tokens or reader.batch_tokens):
            ids, valid = reader.encode([texts[i] for i in batch])
            hidden = reader.hidden(ids, valid)  # [B, L, D]
            if mode != "base":
                vectors = pool(hidden, valid, mode).cpu().numpy()
                for row, place in enumerate(batch):
                    out[place] = vectors[row]
                continue
            for row, place in enumerate(batch):
                states = hidden[row][valid[row]].cpu().numpy()
                out[place] = spread(states, reader.spans(texts[place]), len(texts[place]))
        yield from zip(names, (found for found in out if found is not None), strict=True)


def spread(states: NDArray[np.float32], spans: NDArray[np.int64], letters: int) -> NDArray[np.float32]:
    """States [L, D] of tokens -> [letters, D] of the letters they stand for."""
    out = np.zeros((letters, states.shape[1]), np.float32)
    widths = spans[:, 1] - spans[:, 0]
    place = np.repeat(spans[:, 0] - (np.cumsum(widths) - widths), widths) + np.arange(int(widths.sum()))
    out[place] = np.repeat(states, widths, axis=0)
    return out


def _chunks(reader: Reader, sequences: Iterable[Named]) -> Iterator[tuple[list[str], list[bytes]]]:
    stream = iter(sequences)
    while chunk := list(islice(stream, CHUNK)):
        yield [name for name, _ in chunk], [reader.prepare(text) for _, text in chunk]
