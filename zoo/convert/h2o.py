"""H2O (FMInference/H2O) against its parity cases: the class that drops keys, and the one that masks them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.convert.parity import Case
from zoo.convert.streaming_llm import passes, tiny_llama
from zoo.generate.policies import H2O, H2OMasked
from zoo.nn.positions import rotary, rotate


def replay(case: Case) -> dict[str, Tensor]:
    """Real-drop cases name their sizes, mask cases the ratios to the prompt."""
    return _dropped(case) if "hh_size" in case.config else _masked(case)


@torch.no_grad()
def _dropped(case: Case) -> dict[str, Tensor]:
    config, ids = case.config, case.inputs["input_ids"]
    policy = H2O(int(config["hh_size"]), int(config["recent_size"]))
    model = tiny_llama(case)
    logits, kept, scores, full = [], [], [], None
    layers: list[Any] = []
    for step, (new, layers) in enumerate(passes(model, ids, int(config["prefill"]), policy)):
        logits.append(new)
        if layers[0].length == policy.bound:
            full = step if full is None else full
            kept.append(torch.stack([layer.position[0, :, : layer.length] for layer in layers]))
            scores.append(torch.stack([layer.score[0, :, : layer.length] for layer in layers]))
    first, last = layers[0], layers[-1]
    mixer: Any = model.backbone.layers[0].mixer
    k, position = first.k[:, :, : first.length], first.position[:, :, : first.length]
    if mixer.config.rope is not None:  # the official cache holds them turned
        cos, sin = rotary(mixer.config.rope, mixer.rotary_dim, position)
        k = rotate(k[..., None, :], cos, sin)[..., 0, :]
    return {
        "logits": torch.cat(logits),
        "first_full_step": torch.tensor(-1 if full is None else full),
        "kept_positions": torch.stack(kept),
        "kept_scores": torch.stack(scores),
        "final_k_layer0": k,
        "final_v_last": last.v[:, :, : last.length],
    }


@torch.no_grad()
def _masked(case: Case) -> dict[str, Tensor]:
    config, ids = case.config, case.inputs["input_ids"]
    prompt, total = int(config["prefill"]), ids.shape[1]
    policy = H2OMasked(int(config["heavy_ratio"] * prompt), int(config["recent_ratio"] * prompt))
    logits, masks, scores = [], [], []
    for new, layers in passes(tiny_llama(case), ids, prompt, policy):
        logits.append(new)
        held = [layer.score[0, :, : layer.length] for layer in layers]
        mask = torch.stack([policy.mask(score[None])[0] for score in held])
        masks.append(F.pad(mask.to(torch.uint8), (0, total + 1 - mask.shape[-1])))
        scores.append(F.pad(torch.stack(held), (0, total - held[0].shape[-1])))
    return {"logits": torch.cat(logits), "mask_next": torch.stack(masks), "scores": torch.stack(scores)}
