"""Parity replays of the quantizers that stand alone: TiTok's VQ and Open-MAGVIT2's LFQ. Their keys are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.nn.lfq import LFQ, LFQConfig
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


def vq_config_from_official(official: dict[str, Any]) -> VectorQuantizerConfig:
    """From the arguments of TiTok's `VectorQuantizer`."""
    return VectorQuantizerConfig(
        size=official.get("codebook_size", 1024),
        dim=official.get("token_size", 256),
        l2_norm=official.get("use_l2_norm", False),
        commitment=official.get("commitment_cost", 0.25),
        update="cvq" if official.get("clustering_vq") else "gradient",
    )


def replay_vq(case: Case) -> dict[str, Tensor]:
    """One training step without an optimiser (two for CVQ), then the look-ups."""
    quantizer = VectorQuantizer(vq_config_from_official(case.config))
    quantizer.load_state_dict(case.state)
    cvq = quantizer.config.update == "cvq"
    quantizer.train(cvq)
    weight = quantizer.embedding.weight
    out = {"embedding_before": weight.detach().clone()}
    z = case.inputs["z"].clone().requires_grad_()
    result = quantizer(z.movedim(1, -1))
    codes = result.codes.movedim(-1, 1)
    out |= {"z_quantized": codes, "tokens": result.ids, "quantizer_loss": result.loss, **result.parts}
    if cvq:
        out |= {"embedding_after_1": weight.detach().clone(), "embed_prob_after_1": quantizer.embed_prob.clone()}
    (result.loss + (codes * case.inputs["upstream_grad"]).sum()).backward()
    assert z.grad is not None
    assert weight.grad is not None
    out |= {"grad_z": z.grad, "grad_embedding": weight.grad}
    if "z2" in case.inputs:
        out["tokens_2"] = quantizer(case.inputs["z2"].movedim(1, -1)).ids
        out |= {"embedding_after_2": weight.detach().clone(), "embed_prob_after_2": quantizer.embed_prob.clone()}
    quantizer.eval()
    out["lookup"] = quantizer.lookup(case.inputs["lookup_ids"])
    out["lookup_soft"] = quantizer.mix(case.inputs["soft_codes"])
    return out


def lfq_config_from_official(official: dict[str, Any]) -> LFQConfig:
    """From the arguments of Open-MAGVIT2's `LFQ` and of its entropy loss."""
    return LFQConfig(
        dim=official["dim"],
        temperature=official.get("temperature", 0.01),
        sample_entropy=official.get("sample_minimization_weight", 1.0),
        batch_entropy=official.get("batch_maximization_weight", 1.0),
        factorized=official["dim"] > 14,  # beyond that the table of all codes does not fit
    )


def replay_lfq(case: Case) -> dict[str, Tensor]:
    """Quantize z [B, D, H, W]; gradients are those of entropy + commitment + sum(quant · upstream_grad)."""
    quantizer = LFQ(lfq_config_from_official(case.config))
    z = case.inputs["z"].clone().requires_grad_()
    result = quantizer(z.movedim(1, -1))
    quant = result.codes.movedim(-1, 1)
    (result.loss + (quant * case.inputs["upstream_grad"]).sum()).backward()
    with torch.no_grad():
        again = quantizer.lookup(result.ids).movedim(-1, 1)
    return {
        "quant": quant,
        "tokens": result.ids.flatten(1),
        "from_tokens": again,
        "commit_loss": result.parts["commitment_loss"],
        "per_sample_entropy": result.parts["sample_entropy"],
        "codebook_entropy": result.parts["batch_entropy"],
        "entropy_aux_loss": result.parts["entropy_loss"],
        "grad_z": z.grad,
    }
