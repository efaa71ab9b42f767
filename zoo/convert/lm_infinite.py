"""LM-Infinite (Glaciohound/LM-Infinite) against its parity cases: Llama under the lambda-shaped mask."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.convert.streaming_llm import passes, tiny_llama
from zoo.generate.policies import LMInfinite


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Logits of the whole sequence at once, of prompt and steps, and of a sequence within the local branch."""
    config, ids = case.config, case.inputs["input_ids"]
    policy = LMInfinite(int(config["global_branch"]), int(config["local_branch"]), int(config["limit_distance"]))
    model, length = tiny_llama(case), ids.shape[1]
    short = len(case.outputs["logits_short"])
    first = int(config["prompt"])

    def run(count: int, prompt: int) -> Tensor:
        return torch.cat([logits for logits, _ in passes(model, ids[:, :count], prompt, policy)])

    return {
        "logits_full": run(length, length),
        "logits_prefill_then_decode": run(length, first),
        "logits_short": run(short, short),
    }
