"""A smaller model as the draft: a chain of its guesses, or a tree of independent or distinct ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.generate.noise import Noise
from zoo.generate.samplers import Context, Warper, draw, warp
from zoo.generate.target import ModelTarget
from zoo.generate.verify import Draft

Sampling = Literal["greedy", "independent", "distinct"]


class ModelDraft:
    """Guesses of a draft model with the target's vocabulary.

    One child a node is the classic chain (arXiv:2211.17192). Several independent ones go with SpecTr's rule, several
    distinct ones (drawn without replacement) are RSD-C (arXiv:2402.14160). Any of them leaves the output's law as it
    is; how often guesses are right depends on `warpers` too, which should be the target's.

    Args:
        model: a causal SequenceModel.
        widths: children of each node, depth by depth.
        sampling: `greedy` takes the likeliest tokens as certain guesses; the others draw.
        warpers: samplers of the draft's own logits.
    """

    def __init__(
        self,
        model: Any,
        widths: Sequence[int] = (1, 1, 1, 1),
        sampling: Sampling = "greedy",
        warpers: Sequence[Warper] = (),
    ) -> None:
        self.model = model.eval()
        self.widths = tuple(widths)
        self.sampling = sampling
        self.warpers = tuple(warpers)

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> ModelSession:
        return ModelSession(self, noise, min(room, self.model.max_len or room))


class ModelSession:
    """The draft model's state for one sequence: it has consumed a beginning of the context and nothing else."""

    def __init__(self, strategy: ModelDraft, noise: Noise, room: int) -> None:
        self.strategy = strategy
        self.noise = noise
        self.target = ModelTarget(strategy.model, 1, room)
        self.room = room
        self.consumed = 0

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        if len(context) > self.room:
            return Draft()
        device = self.strategy.model.embed.weight.device
        fresh = torch.tensor([list(context[self.consumed :])], device=device)
        logits = self.target.append(fresh)[0, -1:]
        self.consumed = len(context)
        widths = self.strategy.widths[: max(0, self.room - len(context))]
        if max(widths, default=0) == 1:
            return self._chain(logits, len(context), min(len(widths), budget), device)
        return self._tree(logits, len(context), widths, budget, device)

    def _chain(self, logits: Tensor, step: int, length: int, device: torch.device) -> Draft:
        draft = Draft(laws=None if self.strategy.sampling == "greedy" else [])
        back = self.target.save()
        for i in range(length):
            self._children(draft, i - 1, 1, self._law(logits, step + i))
            if i + 1 < length:
                logits = self.target.append(torch.tensor([draft.tokens[-1:]], device=device))[0]
        back()
        return draft

    def _tree(self, logits: Tensor, step: int, widths: Sequence[int], budget: int, device: torch.device) -> Draft:
        draft = Draft(laws=None if self.strategy.sampling == "greedy" else [])
        frontier = [-1]
        for depth, width in enumerate(widths):
            if depth:
                tokens = torch.tensor([draft.tokens], device=device)
                logits = self.target.tree(tokens, torch.tensor([draft.parent], device=device))[0][frontier]
                self.target.commit(torch.full((1, 1), -1, device=device))
            start = len(draft)
            for node, line in zip(frontier, logits, strict=True):
                self._children(draft, node, min(width, budget - len(draft)), self._law(line[None], step + depth))
            frontier = list(range(start, len(draft)))
            if not frontier or len(draft) >= budget:
                break
        return draft

    def _law(self, logits: Tensor, step: int) -> Tensor:
        context = Context(torch.tensor([step], device=logits.device))
        return warp(logits, self.strategy.warpers, context)[0].double().softmax(-1)

    def _children(self, draft: Draft, node: int, count: int, law: Tensor) -> None:
        """Add *count* children of *node* drawn from *law* [V]."""
        if self.strategy.sampling == "greedy":
            draft.tokens += law.topk(count).indices.tolist()
            draft.parent += [node] * count
            return
        assert draft.laws is not None
        for _ in range(count):
            token = draw(law, self.noise)
            draft.tokens.append(token)
            draft.parent.append(node)
            draft.laws.append(law)
            if self.strategy.sampling == "distinct":
                law = law.clone()
                law[token] = 0
                if not law.sum() > 0:
                    return
                law = law / law.sum()

    def observe(self, verdict: Any) -> None:
        """What was emitted is consumed with the next context."""
