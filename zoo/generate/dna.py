"""DNA from a language model: prompts of letters in, letters out, whatever the tokens of the model are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.generate.engine import GenerateConfig, Generated, generate
from zoo.generate.noise import mix
from zoo.generate.samplers import Allow

BASES = frozenset("ACGT")


@dataclass(frozen=True)
class DnaSample:
    """A generated sequence.

    Attributes:
        prompt, copy: which prompt it continues, and which of its continuations it is, from 0.
        text: the letters after the prompt.
        log_likelihood: of the tokens they came from (natural logarithm, under the model without samplers).
        ended: the model's end token came, or there was no room for more, before as many bases as were asked for.
    """

    prompt: int
    copy: int
    text: str
    log_likelihood: float
    ended: bool


@dataclass(frozen=True)
class DnaOptions:
    """What is generated; how tokens are drawn is in the GenerateConfig.

    Attributes:
        bases: letters of each sequence.
        copies: sequences of each prompt.
        any_letter: let letters other than A, C, G, T come out (N).
        end: let the model's end token end a sequence.
        batch: most sequences at a time.
    """

    bases: int = 200
    copies: int = 1
    any_letter: bool = False
    end: bool = False
    batch: int = 16


class DnaGenerator:
    """A causal model over letters, k-mers or byte pairs that continues DNA.

    Args:
        model, tokenizer: of an artifact; *name* is what messages call it.

    Raises:
        ZooError: a model that does not generate from left to right.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "the model") -> None:
        if getattr(model, "head_kind", None) != "lm":
            raise ZooError(f"{name} has no language-model head, so it cannot generate")
        if model.layout_kind == "full":
            raise ZooError(
                f"{name} is a masked language model, which fills gaps and does not continue sequences: "
                "take a causal one (hyenadna, generator, metagene)"
            )
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.step = int(getattr(tokenizer, "k", 1))
        self.texts = [tokenizer.sequence([token]) for token in range(tokenizer.vocab_size)]
        self.sizes = np.array([len(text) for text in self.texts])
        self.longest = int(self.sizes.max())

    def encode(self, prompts: Sequence[tuple[str, bytes]]) -> list[NDArray[np.int64]]:
        """Ids of (name, letters), the start token before them; k-mers are counted from the right end.

        Raises:
            ZooError: letters that the tokenizer does not know, or nothing at all where the model has no start token.
        """
        rows = []
        for name, text in prompts:
            kept = text.upper()[len(text) % self.step :]
            ids = self.tokenizer.encode(kept, add_special=False)
            unknown = np.flatnonzero(ids == self.tokenizer.special.get("unk", -1))
            if len(unknown):
                start, end = self.tokenizer.offsets(kept, add_special=False)[unknown[0]]
                word = kept[start:end].decode("latin-1")
                raise ZooError(f"prompt '{name}' has '{word}', which the {self.tokenizer.name} tokenizer does not know")
            row = np.concatenate([np.array(self.tokenizer.prefix, np.int64), ids])
            if not len(row):
                what = f"is shorter than {self.step} bases" if text else "is empty"
                raise ZooError(f"prompt '{name}' {what}, and {self.name} has no start token: give it some bases")
            rows.append(row)
        return rows

    def __call__(
        self,
        prompts: Sequence[tuple[str, bytes]],
        options: DnaOptions,
        config: GenerateConfig,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[DnaSample]:
        """Samples in the order of the prompts, the continuations of one side by side.

        Each draws from a stream named by config.seed, the prompt's place and its own, so that batches do not matter.

        Args:
            prompts: (name, letters).
            options: how much.
            config: how tokens are drawn; its limits, bans and stops are set here.
            on_text: called with the letters of the first sequence as they come.

        Raises:
            ZooError: unknown letters, or more tokens than the model takes.
        """
        rows = self.encode(prompts)
        order = [(i, j) for i in range(len(rows)) for j in range(options.copies)]
        shown = 0

        def tell(sequence: int, tokens: list[int]) -> None:
            nonlocal shown
            if sequence == 0 and on_text is not None:
                text = "".join(self.texts[token] for token in tokens)[: options.bases - shown]
                shown += len(text)
                on_text(text)

        for start in range(0, len(order), options.batch):
            part = order[start : start + options.batch]
            found = self._run(
                [rows[i] for i, _ in part], [prompts[i][0] for i, _ in part], options, config,
                [mix(config.seed ^ mix(i * 1_000_003 + j)) for i, j in part], tell if not start and on_text else None,
            )  # fmt: skip
            for (i, j), ids, logprobs, length in zip(
                part, found.ids.tolist(), found.logprobs.tolist(), found.lengths.tolist(), strict=True
            ):
                text = "".join(self.texts[token] for token in ids[:length])
                yield DnaSample(i, j, text[: options.bases], sum(logprobs[:length]), len(text) < options.bases)

    def _run(
        self,
        rows: list[NDArray[np.int64]],
        names: list[str],
        options: DnaOptions,
        config: GenerateConfig,
        seeds: list[int],
        tell: Any,
    ) -> Generated:
        longest = max(map(len, rows))
        need = -(-options.bases // self.step)
        limit = self.model.max_len
        if limit is not None and longest + need > limit:
            fixed = self.longest == self.step  # byte pairs may need fewer tokens than bases
            if fixed or longest >= limit:
                worst = names[int(np.argmax([len(row) for row in rows]))]
                raise ZooError(
                    f"prompt '{worst}' has {longest} tokens and {options.bases} bases more are up to {need}, but "
                    f"{self.name} takes at most {limit}: shorten one of them"
                )
            need = limit - longest
        allowed = [i for i, text in enumerate(self.texts) if text and (options.any_letter or not set(text) - BASES)]
        end = (self.tokenizer.special["eos"],) if options.end and "eos" in self.tokenizer.special else ()
        settings = dataclasses.replace(config, max_new_tokens=need, stop=end, num_return_sequences=1, pad_id=0)
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)  # [B, L]
        for row, line in zip(rows, ids, strict=True):
            line[width - len(row) :] = row
        lengths = np.array([len(row) for row in rows])
        valid = np.arange(width) >= (width - lengths)[:, None]
        device = next(self.model.parameters()).device
        return generate(
            self.model, torch.from_numpy(ids).to(device), torch.from_numpy(valid).to(device), settings, seeds=seeds,
            warpers=[Allow(tuple(sorted({*allowed, *end})))], stop=[self._enough(options.bases)], on_tokens=tell,
        )  # fmt: skip

    def _enough(self, bases: int) -> Callable[[Sequence[int]], bool]:
        """The stop rule: as many letters as were asked for."""
        sizes, longest = self.sizes, self.longest

        def rule(tokens: Sequence[int]) -> bool:
            return len(tokens) * longest >= bases and int(sizes[list(tokens)].sum()) >= bases

        return rule
