"""Exact decoding by bytes (or bases) over a model of longer tokens (Phan et al. 2024, arXiv:2410.09303).

A text's probability under a model of tokens is the sum over its covers: canonical encodings that begin with the text
and whose last token crosses its end or ends there. The next byte's law is the ratio of such sums, so a text may be
continued at any byte, whatever token it ends in, without the bias of encoding an unfinished token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.engine import GenerateConfig
from zoo.generate.loop import decode
from zoo.generate.noise import Noise, mix
from zoo.generate.samplers import Context, draw_rows, warp
from zoo.generate.target import ModelTarget

Tokens = tuple[int, ...]


class Units(Protocol):
    """What exact decoding has to know of a tokenizer.

    Attributes:
        pieces: bytes of each token; empty for special tokens.
        prefix: tokens before every text.
    """

    pieces: Sequence[bytes]
    prefix: Tokens

    def canonical(self, text: bytes) -> Tokens | None:
        """The tokens that the tokenizer cuts *text* into; None where no token ends there."""

    def splits(self, text: bytes) -> Iterable[int]:
        """Where the last token of a cover may begin, len(text) included."""


class Kmers:
    """The units of a k-mer tokenizer that cuts from the left: a cover is the finished k-mers and one more."""

    def __init__(self, tokenizer: Any) -> None:
        self.k = int(tokenizer.k)
        special = set(tokenizer.special.values())
        whole = lambda i, name: i not in special and len(name) == self.k
        self.pieces = [name.encode() if whole(i, name) else b"" for i, name in enumerate(tokenizer.vocab)]
        self.prefix: Tokens = tuple(tokenizer.prefix)
        self._index = {piece: i for i, piece in enumerate(self.pieces) if piece}

    def canonical(self, text: bytes) -> Tokens | None:
        words = [text[i : i + self.k] for i in range(0, len(text), self.k)]
        found = [self._index.get(word) for word in words]
        return None if None in found else tuple(found)  # type: ignore[arg-type]

    def splits(self, text: bytes) -> list[int]:
        return [len(text) // self.k * self.k]


class Subwords:
    """The units of a BPE tokenizer whose tokens spell their own bytes."""

    def __init__(self, tokenizer: Any) -> None:
        special = {*tokenizer.special.values(), *tokenizer.hidden}
        self.pieces = [b"" if i in special else name.encode() for i, name in enumerate(tokenizer.vocab)]
        self.prefix: Tokens = tuple(tokenizer.prefix)
        self._encode = tokenizer.encode
        self._longest = max(map(len, self.pieces))

    def canonical(self, text: bytes) -> Tokens | None:
        tokens = tuple(self._encode(text, add_special=False).tolist()) if text else ()
        return tokens if b"".join(self.pieces[t] for t in tokens) == text else None

    def splits(self, text: bytes) -> range:
        return range(max(0, len(text) - self._longest + 1), len(text) + 1)


@dataclass(frozen=True)
class Cover:
    """An encoding that begins with the text: its tokens, log-probability, and the bytes beyond the text."""

    tokens: Tokens
    logprob: float
    beyond: bytes


class ByteView:
    """A model of tokens seen as a model of bytes.

    Args:
        model: a causal SequenceModel with a language-model head.
        units: its tokenizer's.
        capacity: most tokens of a text.

    Attributes:
        forwards: forward passes so far.
    """

    def __init__(self, model: Any, units: Units, capacity: int) -> None:
        self.model = model
        self.units = units
        self.capacity = min(capacity, model.max_len or capacity)
        self._starts: dict[bytes, list[int]] = {}  # beginning -> the tokens that have it
        for token, piece in enumerate(units.pieces):
            for stop in range(1, len(piece) + 1):
                self._starts.setdefault(piece[:stop], []).append(token)
        self._special = torch.tensor([t for t, piece in enumerate(units.pieces) if not piece], dtype=torch.long)
        self.forwards = 0
        self._reset()

    def _reset(self) -> None:
        self.target = ModelTarget(self.model, 1, self.capacity)
        self._done: Tokens = ()
        self._logprob = 0.0
        self._law = torch.zeros(0)  # [V] log-probabilities after `_done`

    def covers(self, text: bytes) -> tuple[list[Cover], Tensor]:
        """The covers of *text*, the one that ends with it (if any) last, and the bytes' law [256] (float64).

        The law is over canonical continuations: it sums to less than 1 by what special tokens have, while tokens that
        the tokenizer would never put there take no part. Log-probabilities are natural and count from the prefix.

        Raises:
            ZooError: no encoding begins with the text, or more tokens than the capacity.
        """
        units, pieces = self.units, self.units.pieces
        lefts = {i: left for i in units.splits(text) if (left := units.canonical(text[:i])) is not None}
        wanted: dict[int, list[int]] = {}
        for i, left in lefts.items():
            ways = range(len(pieces)) if i == len(text) else self._starts.get(text[i:], [])
            found = [t for t in ways if len(pieces[t]) > len(text) - i]
            wanted[i] = [t for t in found if units.canonical(text[:i] + pieces[t]) == (*left, t)]
        used = [i for i in lefts if wanted[i] or i == len(text)]
        if not used:
            raise ZooError(f"no encoding of the tokenizer begins with {text[-40:]!r}")
        known = self._read([lefts[i] for i in used])
        result, law, special = [], torch.zeros(256, dtype=torch.float64), 0.0
        base = max(logprob for logprob, _ in known)  # sums stay in range
        for i, (logprob, after) in zip(used, known, strict=True):
            tokens = torch.tensor(wanted[i], dtype=torch.long)
            masses = (after[tokens] + (logprob - base)).exp()
            at = len(text) - i
            law.index_add_(0, torch.tensor([pieces[t][at] for t in wanted[i]], dtype=torch.long), masses)
            if i == len(text):
                own = Cover(lefts[i], logprob, b"")
                special = float((after[self._special] + (logprob - base)).exp().sum())
            else:
                scores = (after[tokens] + logprob).tolist()
                result += [Cover((*lefts[i], t), s, pieces[t][at:]) for t, s in zip(wanted[i], scores, strict=True)]
        if len(text) in used:
            result.append(own)
        return result, law / (law.sum() + special)

    def logprob(self, text: bytes) -> float:
        """log P of all texts that begin with *text*, given the prefix."""
        found, _ = self.covers(text)
        return float(torch.tensor([cover.logprob for cover in found], dtype=torch.float64).logsumexp(0))

    @torch.inference_mode()
    def _read(self, encodings: list[Tokens]) -> list[tuple[float, Tensor]]:
        """(log-probability, law [V] after it) of each encoding; what all begin with is kept in the cache."""
        prefix = self.units.prefix
        full = [(*prefix, *tokens) for tokens in encodings]
        shared = min(map(len, full))
        while any(tokens[:shared] != full[0][:shared] for tokens in full):
            shared -= 1
        if full[0][: len(self._done)] != self._done or shared < len(self._done):
            self._reset()
        self._append(full[0][len(self._done) : shared])
        nodes: dict[Tokens, int] = {}
        for tokens in full:
            for stop in range(shared + 1, len(tokens) + 1):
                nodes.setdefault(tokens[:stop], len(nodes))
        laws = self._tree(list(nodes), nodes) if nodes else torch.zeros(0)
        result = []
        for tokens in full:
            logprob, law = self._logprob, self._law
            for stop in range(shared + 1, len(tokens) + 1):
                if stop > 1:
                    logprob += float(law[tokens[stop - 1]])
                law = laws[nodes[tokens[:stop]]]
            result.append((logprob, law))
        return result

    def _append(self, tokens: Tokens) -> None:
        if not tokens:
            return
        if len(self._done) + len(tokens) > self.capacity:
            raise ZooError(f"the text has more than the {self.capacity} tokens that there is room for")
        device = self.model.embed.weight.device
        laws = self._laws(self.target.append(torch.tensor([tokens], device=device)))
        for place, token in enumerate(tokens):
            known = len(self._done) + place >= max(1, len(self.units.prefix))  # the prefix is given
            before = self._law if place == 0 else laws[place - 1]
            self._logprob += float(before[token]) if known else 0.0
        self._done, self._law = (*self._done, *tokens), laws[-1]

    def _tree(self, paths: list[Tokens], nodes: dict[Tokens, int]) -> Tensor:
        device = self.model.embed.weight.device
        tokens = torch.tensor([[path[-1] for path in paths]], device=device)
        parent = torch.tensor([[nodes.get(path[:-1], -1) for path in paths]], device=device)
        laws = self._laws(self.target.tree(tokens, parent))
        self.target.commit(torch.full((1, 1), -1, device=device))
        return laws

    def _laws(self, logits: Tensor) -> Tensor:
        self.forwards += 1
        return logits[0].double().log_softmax(-1).cpu()


class _Bytes:
    """The order of decoding: one byte after the other."""

    def __init__(
        self,
        view: ByteView,
        prompt: bytes,
        config: GenerateConfig,
        noise: Noise,
        on_byte: Callable[[int], None] | None = None,
    ) -> None:
        self.view, self.config, self.noise, self.on_byte = view, config, noise, on_byte
        self.prompt = self.text = prompt
        self.warpers = replace(config, ban=(), stop=()).warpers()

    def next(self) -> bytes | None:
        new = len(self.text) - len(self.prompt)
        over = new >= self.config.max_new_tokens or (new > 0 and self.text[-1] in self.config.stop)
        return None if over else self.text

    def run(self, work: bytes) -> Tensor:
        return self.view.covers(work)[1]

    def take(self, work: bytes, logits: Tensor) -> None:
        law = logits.clone()
        law[list(self.config.ban)] = 0
        if not law.sum() > 0:
            raise ZooError(f"no byte can follow {work[-40:]!r}")
        if self.config.temperature == 0:
            token = int(law.argmax())
        else:
            context = Context(torch.tensor([len(work) - len(self.prompt)]))
            token = int(draw_rows(warp(law.log()[None], self.warpers, context), [self.noise])[0])
        self.text = work + bytes([token])
        if self.on_byte is not None:
            self.on_byte(token)


def generate_bytes(
    model: Any,
    units: Units,
    prompts: Sequence[bytes],
    config: GenerateConfig | None = None,
    seeds: Sequence[int] | None = None,
    on_byte: Callable[[int, int], None] | None = None,
) -> list[bytes]:
    """Continue *prompts* byte by byte, each byte from its exact law; prompts need not end where a token does.

    Args:
        model: a causal SequenceModel.
        units: of its tokenizer.
        prompts: texts, each at least as long as makes one token where the units have no prefix.
        config: `max_new_tokens` counts bytes, `ban` and `stop` are bytes; temperature, top_k, top_p, min_p and seed
            as elsewhere.
        seeds: one for each prompt.
        on_byte: called with (prompt number, byte) as they come.

    Raises:
        ZooError: options of the config that exact decoding does not have.
    """
    cfg = config or GenerateConfig()
    plain = cfg.guidance == 1 and cfg.block == 1 and cfg.repetition == 1 and not cfg.stop_sequences
    if not plain or cfg.num_return_sequences > 1 or cfg.min_new_tokens:
        raise ZooError(
            "exact decoding by bytes goes without guidance, blocks, repetition, stop_sequences, min_new_tokens and "
            "num_return_sequences"
        )
    seeds = [mix(cfg.seed ^ mix(i)) for i in range(len(prompts))] if seeds is None else seeds
    training = model.training
    model.eval()
    try:
        results = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            room = len(units.prefix) + len(prompt) + cfg.max_new_tokens + 16  # a token has at least one byte
            tell = None if on_byte is None else partial(on_byte, number)
            scheme = _Bytes(ByteView(model, units, room), prompt, cfg, Noise(seed), tell)
            decode(scheme, scheme.run)
            results.append(scheme.text[len(prompt) :])
        return results
    finally:
        model.train(training)
