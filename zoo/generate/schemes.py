"""Orders of decoding for causal models: left to right with drafts or without, and in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.draft import DraftSession, DraftStrategy, Verdict
from zoo.generate.noise import Noise
from zoo.generate.samplers import Context, Warper, draw_rows, warp
from zoo.generate.verify import Draft, NodeRule, verify, verify_greedy

StopRule = Callable[[Sequence[int]], bool]
OnTokens = Callable[[int, list[int]], None]


@dataclass
class Rows:
    """The sequences of a call, and all that happens to them apart from the model.

    Attributes:
        prompts: prompt tokens of each.
        noises: random stream of each.
        warpers: samplers, in order.
        config: GenerateConfig.
        stop: further stop rules.
        on_tokens: told of new tokens.
        tokens, logprobs: what came out.
        active: sequences that go on, in the order of the target's rows.
        accepted: accepted guesses of every verified draft.
    """

    prompts: list[list[int]]
    noises: list[Noise]
    warpers: list[Warper]
    config: Any
    stop: list[StopRule] = field(default_factory=list)
    on_tokens: OnTokens | None = None
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.prompts]
        self.logprobs = [[] for _ in self.prompts]
        self.active = list(range(len(self.prompts)))
        self.ends = set(self.config.stop)
        self.greedy = self.config.temperature == 0
        self.needs_seen = any(warper.needs_seen for warper in self.warpers)
        self._seen: Tensor | None = None

    def warped(self, logits: Tensor, rows: Sequence[int], drafts: Sequence[Draft] | None = None) -> Tensor:
        """Logits [N, V] through the samplers: one position for each of *rows*, or its root and guesses."""
        if not self.warpers:
            return logits
        steps = [len(self.tokens[row]) for row in rows]
        seen = self._seen_before(logits, rows) if self.needs_seen else None
        if drafts is not None:
            (row,), (draft,) = rows, drafts  # trees are judged one sequence at a time
            depth, lines = [0], None if seen is None else [seen[0]]
            for token, up in zip(draft.tokens, draft.parent, strict=True):
                depth.append(depth[up + 1] + 1)
                if lines is not None:
                    line = lines[up + 1].clone()
                    line[token] = True
                    lines.append(line)
            steps = [len(self.tokens[row]) + d for d in depth]
            seen = None if lines is None else torch.stack(lines)
        return warp(logits, self.warpers, Context(torch.tensor(steps, device=logits.device), seen))

    def _seen_before(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(len(self.prompts), logits.shape[-1], dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(self.prompts):
                self._seen[row, prompt] = True
        return self._seen[list(rows)]

    def emit(self, row: int, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Put out *tokens* until the sequence ends; whether it has."""
        cfg, out, fresh, ended = self.config, self.tokens[row], [], False
        for token, logprob in zip(tokens, logprobs, strict=True):
            out.append(token)
            fresh.append(token)
            self.logprobs[row].append(logprob)
            if self._seen is not None:
                self._seen[row, token] = True
            if token in self.ends or len(out) >= cfg.max_new_tokens or self._stopped(out):
                ended = True
                break
        if self.on_tokens is not None and fresh:
            self.on_tokens(row, fresh)
        return ended

    def _stopped(self, out: list[int]) -> bool:
        if any(tuple(out[-len(end) :]) == tuple(end) for end in self.config.stop_sequences):
            return True
        return any(rule(out) for rule in self.stop)

    def choose(self, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[float]]:
        """A token [N] after each of *rows* from logits [N, V], and the log-probabilities."""
        warped = self.warped(logits, rows)
        chosen = warped.argmax(-1) if self.greedy else draw_rows(warped, [self.noises[row] for row in rows])
        wide = logits.float()
        logprob = wide.gather(-1, chosen[:, None])[:, 0] - wide.logsumexp(-1)
        return chosen, logprob.tolist()


@dataclass
class TreeWork:
    """Tokens [B, n] for one forward pass; parent [B, n] where they are trees, and the drafts that they came from."""

    tokens: Tensor
    parent: Tensor | None = None
    drafts: list[Draft] | None = None


class LeftToRight:
    """One token after the other, or as many as a draft guesses right.

    Args:
        target: the model and its states.
        rows: the sequences.
        draft: source of guesses, None for none.
        rule: acceptance at a node.
        capacity: tokens a row can hold.
        length: tokens of the longest prompt.
    """

    def __init__(
        self, target: Any, rows: Rows, draft: DraftStrategy | None, rule: NodeRule, capacity: int, length: int
    ) -> None:
        self.target = target
        self.rows = rows
        self.rule = rule
        self.capacity = capacity
        self.length = length
        self.sessions: list[DraftSession] | None = None
        if draft is not None:
            noises = [noise.fork(1) for noise in rows.noises]
            self.sessions = [draft.session(p, noise, capacity) for p, noise in zip(rows.prompts, noises, strict=True)]
        self.last = torch.zeros(0)  # [B] tokens that the model has not consumed yet

    def start(self, logits: Tensor | None, last: Tensor) -> None:
        """Begin after the prompts, from the logits [B, V] after them; or, where the last prompt tokens *last* [B] are
        not consumed yet (they are the first drafts' roots), without."""
        self.last = last
        if logits is not None:
            chosen, logprobs = self.rows.choose(logits, self.rows.active)
            self._emit([[token] for token in chosen.tolist()], [[p] for p in logprobs], chosen)

    def next(self) -> TreeWork | None:
        rows = self.rows
        if not rows.active:
            return None
        if self.sessions is None:
            return TreeWork(self.last[:, None])
        drafts = [self._propose(row) for row in rows.active]
        widest = max(map(len, drafts))
        if not widest:
            return TreeWork(self.last[:, None], None, drafts)
        # the rest of shorter trees hangs on the root and is never accepted
        device = self.last.device
        guesses = torch.tensor([d.tokens + [0] * (widest - len(d)) for d in drafts], device=device)
        parent = [[-1, *(up + 1 for up in d.parent), *[0] * (widest - len(d))] for d in drafts]
        return TreeWork(torch.cat([self.last[:, None], guesses], 1), torch.tensor(parent, device=device), drafts)

    def _propose(self, row: int) -> Draft:
        rows = self.rows
        held = self.length + max(len(tokens) for tokens in rows.tokens)
        wanted = rows.config.max_new_tokens - len(rows.tokens[row]) - 1
        budget = min(rows.config.draft_budget, self.capacity - held)
        if wanted <= 0 or budget <= 0:
            return Draft()
        assert self.sessions is not None
        return self.sessions[row].propose(rows.prompts[row] + rows.tokens[row], budget)

    def run(self, work: TreeWork) -> Tensor:
        """Logits [B, n, V] of *work*."""
        if work.parent is None:
            return self.target.append(work.tokens)
        return self.target.tree(work.tokens, work.parent)

    def take(self, work: TreeWork, logits: Tensor) -> None:
        rows = self.rows
        if work.drafts is None:
            chosen, logprobs = rows.choose(logits[:, -1], rows.active)
            self._emit([[token] for token in chosen.tolist()], [[p] for p in logprobs], chosen)
            return
        paths, emitted, scores, last = [], [], [], []
        for i, (row, draft) in enumerate(zip(rows.active, work.drafts, strict=True)):
            own = logits[i, : len(draft) + 1]
            warped = rows.warped(own, [row], [draft])
            if rows.greedy:
                path, token = verify_greedy(draft, warped.argmax(-1).tolist())
            else:
                path, token = verify(draft, warped.double().softmax(-1), rows.noises[row], self.rule)
            new = [draft.tokens[node] for node in path] + [token]
            at = torch.tensor([-1, *path], device=own.device) + 1
            index = torch.tensor(new, device=own.device)
            score = own[at].float().log_softmax(-1).gather(-1, index[:, None])[:, 0]
            hidden = None if self.target.hidden is None else self.target.hidden[i, : len(draft) + 1]
            assert self.sessions is not None
            self.sessions[row].observe(Verdict(int(work.tokens[i, 0]), draft, own, hidden, path, new))
            paths.append([0, *(node + 1 for node in path)])
            emitted.append(new)
            scores.append(score.tolist())
            last.append(token)
            rows.accepted.append(len(path))
        if work.parent is not None:
            longest = max(map(len, paths))
            kept = [path + [-1] * (longest - len(path)) for path in paths]
            self.target.commit(torch.tensor(kept, device=logits.device))
        self._emit(emitted, scores, torch.tensor(last, device=logits.device))

    def _emit(self, tokens: list[list[int]], logprobs: list[list[float]], last: Tensor) -> None:
        rows = self.rows
        ended = [rows.emit(row, t, p) for row, t, p in zip(rows.active, tokens, logprobs, strict=True)]
        self.last = last
        if any(ended):
            stay = [i for i, over in enumerate(ended) if not over]
            rows.active = [rows.active[i] for i in stay]
            if rows.active:  # the batch shrinks
                index = torch.tensor(stay, device=last.device)
                self.target.select(index)
                self.last = last[index]


class Blocks:
    """Next-block prediction (arXiv:2502.07737): all tokens of a block see each other and everything before, and each
    position predicts the same position of the next block.

    Args:
        target: the model and its states.
        rows: the sequences.
        size: tokens a block.
    """

    def __init__(self, target: Any, rows: Rows, size: int) -> None:
        self.target = target
        self.rows = rows
        self.size = size
        self.last = torch.zeros(0)

    def start(self, ids: Tensor, copies: int) -> None:
        """Consume the prompts [B, L], whole blocks of equal length.

        Raises:
            ZooError: prompts that are not.
        """
        if ids.shape[1] % self.size or len({len(prompt) for prompt in self.rows.prompts}) > 1:
            raise ZooError(f"decoding in blocks of {self.size} needs prompts of one length that is a multiple of it")
        for start in range(0, ids.shape[1], self.size):
            logits = self.target.block(ids[:, start : start + self.size])
        if copies > 1:
            rows = torch.arange(len(logits), device=ids.device).repeat_interleave(copies)
            self.target.select(rows)
            logits = logits[rows]
        self.take(TreeWork(ids), logits)

    def next(self) -> TreeWork | None:
        return TreeWork(self.last) if self.rows.active else None

    def run(self, work: TreeWork) -> Tensor:
        """Logits [B, k, V] of *work*."""
        return self.target.block(work.tokens)

    def take(self, work: TreeWork, logits: Tensor) -> None:
        rows = self.rows
        columns = [rows.choose(logits[:, i], rows.active) for i in range(self.size)]
        self.last = torch.stack([chosen for chosen, _ in columns], 1)  # [B, k]
        scores = list(zip(*(column for _, column in columns), strict=True))
        tokens = self.last.tolist()
        ended = [rows.emit(row, t, p) for row, t, p in zip(rows.active, tokens, scores, strict=True)]
        if any(ended):
            stay = [i for i, over in enumerate(ended) if not over]
            rows.active = [rows.active[i] for i in stay]
            if rows.active:
                index = torch.tensor(stay, device=logits.device)
                self.target.select(index)
                self.last = self.last[index]
