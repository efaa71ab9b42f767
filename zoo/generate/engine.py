"""Generation from any causal sequence model: prompts of any lengths, samplers, stop rules, drafts, cache policies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.config import config
from zoo.errors import ZooError
from zoo.generate.draft import DraftStrategy
from zoo.generate.loop import decode
from zoo.generate.maskgit import power_cosine
from zoo.generate.noise import Noise, mix
from zoo.generate.samplers import Ban, MinP, Repetition, Temperature, TopK, TopP, Warper
from zoo.generate.schemes import Blocks, LeftToRight, OnTokens, Rows, StopRule
from zoo.generate.target import GuidedTarget, ModelTarget
from zoo.generate.verify import NodeRule, recursive
from zoo.nn.policy import CachePolicy


@config
class GenerateConfig:
    """How to generate.

    Attributes:
        max_new_tokens: most tokens a sequence.
        min_new_tokens: stop tokens are not drawn before that many.
        temperature: of the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens, 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability, 1 for all.
        min_p: draw from tokens at least this fraction as likely as the likeliest, 0 for all.
        repetition: logits of tokens seen before are divided (where negative: multiplied) by it; 1 changes nothing.
        ban: tokens that never come out, such as specials.
        stop: tokens that end a sequence; they are its last token.
        stop_sequences: runs of tokens that end a sequence.
        guidance: scale of classifier-free guidance against the `negative` prompts.
        guidance_schedule: `constant`, or rising from 0 (`linear`) or 1 (`power-cosine`) over max_new_tokens.
        guidance_power: exponent of `power-cosine`.
        num_return_sequences: continuations of each prompt.
        seed: of the sampling; sequence i of the result draws from its own stream, named by seed and i.
        block: tokens that come into being together, all seeing each other (next-block prediction); 1 is left to right.
        draft_budget: most guesses a forward pass.
        prefill_chunk: tokens of the prompt a forward pass, 0 for all; bounds the memory of long prompts.
        pad_id: what fills shorter results.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    ban: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    guidance: float = 1.0
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = "constant"
    guidance_power: float = 2.75
    num_return_sequences: int = 1
    seed: int = 0
    block: int = 1
    draft_budget: int = 16
    prefill_chunk: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_return_sequences < 1 or self.block < 1:
            raise ValueError("max_new_tokens, num_return_sequences and block must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.repetition <= 0:
            raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, 0 <= min_p < 1 and repetition > 0")

    def warpers(self) -> list[Warper]:
        """The samplers that the fields ask for, in order."""
        chain: list[Warper] = []
        if self.ban:
            chain.append(Ban(self.ban))
        if self.min_new_tokens and self.stop:
            chain.append(Ban(self.stop, self.min_new_tokens))
        if self.repetition != 1:
            chain.append(Repetition(self.repetition))
        if self.temperature > 0:
            if self.temperature != 1:
                chain.append(Temperature(self.temperature))
            if self.top_k:
                chain.append(TopK(self.top_k))
            if self.top_p < 1:
                chain.append(TopP(self.top_p))
            if self.min_p:
                chain.append(MinP(self.min_p))
        return chain

    def scale(self, emitted: int) -> float:
        """Guidance scale of the token after *emitted* others."""
        progress = emitted / self.max_new_tokens
        if self.guidance_schedule == "linear":
            return self.guidance * progress
        if self.guidance_schedule == "power-cosine":
            return power_cosine(self.guidance, progress, self.guidance_power)
        return self.guidance


@dataclass
class Stats:
    """What a call did.

    Attributes:
        forwards: forward passes of the model, the prompt's and repeated ones included.
        tokens: tokens put out, all sequences together.
        prefill_seconds, decode_seconds: wall time of the prompt and of all after it.
        accepted: for each verified draft, the number of accepted guesses.
        state_bytes: size of the decoding state at the end.
        exact: the output has exactly the law of the model under the samplers.
    """

    forwards: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    accepted: list[int] = field(default_factory=list)
    state_bytes: int = 0
    exact: bool = True

    @property
    def tokens_per_forward(self) -> float:
        """Tokens for each pass after the prompt's, of one sequence (1 without drafts)."""
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else 1.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
            self.accepted + other.accepted,
            self.state_bytes + other.state_bytes,
            self.exact and other.exact,
        )


@dataclass
class Generated:
    """Result of `generate`; the continuations of a prompt stand side by side.

    Attributes:
        ids: [B · num_return_sequences, T] new tokens without the prompt, filled with pad_id.
        lengths: [B · num_return_sequences] new tokens of each sequence.
        logprobs: [B · num_return_sequences, T] the model's log-probability of each token (natural logarithm; before
            the samplers, after guidance), 0 at the filling.
        stats: what it took.
    """

    ids: Tensor
    lengths: Tensor
    logprobs: Tensor
    stats: Stats


@torch.inference_mode()
def generate(
    model: Any,
    ids: Tensor,
    valid: Tensor | None = None,
    config: GenerateConfig | None = None,
    *,
    negative: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    segments: Sequence[int] | None = None,
    warpers: Sequence[Warper] = (),
    stop: Sequence[StopRule] = (),
    draft: DraftStrategy | None = None,
    rule: NodeRule = recursive,
    policy: CachePolicy | None = None,
    on_tokens: OnTokens | None = None,
    lean: bool = True,
) -> Generated:
    """Continue the prompts *ids* [B, L].

    Args:
        model: a causal SequenceModel with a language-model head.
        ids: prompts, padded on either side.
        valid: [B, L] bool, True for real tokens; None when all are.
        config: see GenerateConfig; greedy by default.
        negative: [B or 1, L'] prompts without the condition, for guidance.
        seeds: one for each sequence of the result, in place of those derived from config.seed: a sequence then comes
            out the same in any batch.
        segments: lengths of a prefix, of segments that do not see each other, and of a suffix, which make up every
            prompt: the order of the segments changes nothing (set-based prompting).
        warpers: further samplers, before those of the config (constraints).
        stop: further rules: each gets the new tokens of a sequence and says whether it has ended.
        draft: guesses to be verified several at a time.
        rule: acceptance of drafted tokens at a node of the tree.
        policy: what key-value caches keep; None keeps all.
        on_tokens: called with (sequence, new tokens) as they come.
        lean: take the short cut through plain decoders. On a CPU, 64 new tokens or more also make a copy of the weights
            (of up to 4 GiB) in the order that is read fastest, which is dropped when the call ends.

    Raises:
        ZooError: an empty prompt, a model that cannot be that long or has no language-model head, or options that
            exclude each other.
    """
    cfg = config or GenerateConfig()
    ids, valid = _left(ids, valid)
    _check(model, cfg, ids, negative, draft, policy, seeds)
    if segments is not None and not (valid is None and negative is None and draft is None and policy is None):
        raise ZooError("`segments` go with prompts of one length, and without drafts, guidance or a cache policy")
    total = len(ids) * cfg.num_return_sequences
    seeds = [mix(cfg.seed ^ mix(i)) for i in range(total)] if seeds is None else list(seeds)
    training = model.training
    model.eval()
    try:
        run = _Run(model, cfg, list(warpers), list(stop), draft, rule, policy, on_tokens, lean, segments)
        if _one_by_one(model, valid, draft, policy):
            return _each(run, ids, valid, negative, seeds)
        return run(ids, valid, negative, seeds)
    finally:
        model.train(training)


@dataclass
class _Run:
    model: Any
    config: GenerateConfig
    warpers: list[Warper]
    stop: list[StopRule]
    draft: DraftStrategy | None
    rule: NodeRule
    policy: CachePolicy | None
    on_tokens: OnTokens | None
    lean: bool
    segments: Sequence[int] | None = None

    def __call__(self, ids: Tensor, valid: Tensor | None, negative: Tensor | None, seeds: list[int]) -> Generated:
        cfg, copies = self.config, self.config.num_return_sequences
        prompts = [row.tolist() if valid is None else row[keep].tolist() for row, keep in _pairs(ids, valid)]
        if negative is not None:
            ids, valid = _stacked(ids, valid, negative)
        longest = ids.shape[1]
        room = longest + cfg.max_new_tokens + (cfg.draft_budget if self.draft is not None else 0)
        room += -cfg.max_new_tokens % cfg.block
        limit = self.model.max_len
        inner = ModelTarget(self.model, len(ids), min(room, limit or room), self.policy, self.lean, cfg.max_new_tokens)
        target: Any = inner if negative is None else GuidedTarget(inner, cfg.scale)
        if self.draft is not None and negative is not None and not inner.trees:
            raise ZooError("a draft under guidance needs a model whose layers are all attention")
        start = time.perf_counter()
        chain = [*self.warpers, *cfg.warpers()]
        rows = Rows(
            [prompt for prompt in prompts for _ in range(copies)], [Noise(seed) for seed in seeds], chain, cfg,
            self.stop, self.on_tokens,
        )  # fmt: skip
        if cfg.block > 1:
            scheme: Any = Blocks(target, rows, cfg.block)
            scheme.start(ids, copies)
        else:
            logits = self._prefill(target, ids, valid)
            last = ids[: len(prompts), -1]
            if copies > 1:
                index = torch.arange(len(prompts), device=ids.device).repeat_interleave(copies)
                target.select(index)
                logits, last = None if logits is None else logits[index], last[index]
            scheme = LeftToRight(target, rows, self.draft, self.rule, inner.capacity, longest)
            scheme.start(logits, last)
        filled = time.perf_counter()
        decode(scheme, scheme.run)
        stats = Stats(
            forwards=inner.forwards,
            tokens=sum(map(len, rows.tokens)),
            prefill_seconds=filled - start,
            decode_seconds=time.perf_counter() - filled,
            accepted=rows.accepted,
            state_bytes=inner.state.nbytes(),
        )
        return _result(rows, cfg.pad_id, ids.device, stats)

    def _prefill(self, target: Any, ids: Tensor, valid: Tensor | None) -> Tensor | None:
        """Logits after the prompts; None with drafts, whose first root is the last prompt token."""
        chunk = self.config.prefill_chunk
        if self.segments is not None:
            return target.prefill_set(ids, self.segments)
        if self.draft is None:
            return target.prefill(ids, valid, chunk)
        if ids.shape[1] > 1:
            target.prefill(ids[:, :-1], None if valid is None else valid[:, :-1], chunk)
        if isinstance(target, GuidedTarget):
            target.hold(ids[len(ids) // 2 :, -1])
        return None


def _each(run: _Run, ids: Tensor, valid: Tensor | None, negative: Tensor | None, seeds: list[int]) -> Generated:
    """One sequence at a time, for states that cannot hold rows of unlike length."""
    parts, copies, report = [], run.config.num_return_sequences, run.on_tokens
    single = replace(run, config=replace(run.config, num_return_sequences=1))
    for i, (row, keep) in enumerate(_pairs(ids, valid)):
        prompt = row[None] if keep is None else row[keep][None]
        against = None if negative is None else negative[i : i + 1] if len(negative) > 1 else negative
        for j in range(i * copies, (i + 1) * copies):
            if report is not None:
                single.on_tokens = lambda _, tokens, j=j: report(j, tokens)
            parts.append(single(prompt, None, against, seeds[j : j + 1]))
    longest = max(part.ids.shape[1] for part in parts)

    def joined(tensors: list[Tensor], fill: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=fill) for t in tensors])

    stats = parts[0].stats
    for part in parts[1:]:
        stats = stats + part.stats
    return Generated(
        joined([part.ids for part in parts], run.config.pad_id),
        torch.cat([part.lengths for part in parts]),
        joined([part.logprobs for part in parts], 0),
        stats,
    )


def _one_by_one(model: Any, valid: Tensor | None, draft: Any, policy: Any) -> bool:
    if policy is not None:
        return valid is not None
    single = valid is not None and int(valid.sum(1).min()) < 2  # nothing to consume before the first root
    return draft is not None and (single or not ModelTarget(model, 1, 1, None, False).trees)


def _pairs(ids: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    return [(row, None if valid is None else valid[i]) for i, row in enumerate(ids)]


def _left(ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Padding moved to the left, and as little of it as the longest prompt allows; None where there is none."""
    if valid is None:
        return ids, None
    order = torch.argsort(valid.to(torch.uint8), dim=1, stable=True)
    longest = int(valid.sum(1).max())
    ids, valid = (t.gather(1, order)[:, valid.shape[1] - longest :] for t in (ids, valid))
    return ids, None if bool(valid.all()) else valid


def _stacked(ids: Tensor, valid: Tensor | None, negative: Tensor) -> tuple[Tensor, Tensor | None]:
    """Prompts with the condition above those without it, padded on the left to one length."""
    negative = negative.expand(len(ids), -1)
    width = max(ids.shape[1], negative.shape[1])
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid

    def wide(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (width - t.shape[1], 0))

    both = torch.cat([wide(valid), wide(torch.ones_like(negative, dtype=torch.bool))])
    return torch.cat([wide(ids), wide(negative)]), None if bool(both.all()) else both


def _result(rows: Rows, pad_id: int, device: torch.device, stats: Stats) -> Generated:
    lengths = [len(tokens) for tokens in rows.tokens]
    longest = max(lengths)
    ids = torch.tensor([tokens + [pad_id] * (longest - len(tokens)) for tokens in rows.tokens], device=device)
    logprobs = torch.tensor([line + [0.0] * (longest - len(line)) for line in rows.logprobs], device=device)
    return Generated(ids, torch.tensor(lengths, device=device), logprobs, stats)


def _check(
    model: Any, cfg: GenerateConfig, ids: Tensor, negative: Any, draft: Any, policy: Any, seeds: Sequence[int] | None
) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise ZooError(f"prompts must be ids [B, L] of at least one token, got a tensor of {list(ids.shape)}")
    if getattr(model, "head_kind", None) != "lm":
        raise ZooError(f"{type(model).__name__} has no language-model head, so it cannot generate")
    need = ids.shape[1] + cfg.max_new_tokens
    if model.max_len is not None and need > model.max_len:
        raise ZooError(
            f"prompt and max_new_tokens are {ids.shape[1]} + {cfg.max_new_tokens} tokens, but this model takes at most "
            f"{model.max_len} (max_len)"
        )
    if seeds is not None and len(seeds) != len(ids) * cfg.num_return_sequences:
        raise ZooError(f"{len(ids) * cfg.num_return_sequences} sequences need as many seeds, got {len(seeds)}")
    if cfg.guidance != 1 and negative is None:
        raise ZooError(f"guidance {cfg.guidance} needs `negative`, the prompts without the condition")
    clash = [
        (draft is not None and policy is not None, "a draft", "a cache policy", "it forgets between any two tokens"),
        (draft is not None and cfg.block > 1, "a draft", "block > 1", "a block's tokens come at once already"),
        (policy is not None and cfg.block > 1, "a cache policy", "block > 1", "it forgets between any two tokens"),
    ]
    for both, one, other, why in clash:
        if both:
            raise ZooError(f"{one} and {other} cannot be used together: {why}")
