"""Recursive rejection (RSD, arXiv:2402.14160) against its parity cases: the node rule of the verifier."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.generate.verify import recursive


def without(p: Tensor, drawn: list[int]) -> list[Tensor]:
    """The laws of children *drawn* one after the other without replacement from *p*."""
    laws, rest = [], p
    for token in drawn:
        laws.append(rest)
        rest = rest.clone()
        rest[token] = 0
        rest = rest / rest.sum() if rest.sum() > 0 else rest
    return laws


def acceptance(p: Tensor, q: Tensor, count: int, replace: bool) -> float:
    """Probability that one of *count* children is accepted, over all ways of drawing them."""
    total, size = 0.0, len(p)
    for drawn in itertools.product(range(size), repeat=count):
        laws = [p] * count if replace else without(p, list(drawn))
        chance = 1.0
        for token, law in zip(drawn, laws, strict=True):
            chance *= float(law[token])
        if chance > 0:
            refused = 1.0
            for accept in recursive(q, drawn, laws)[0]:
                refused *= 1 - accept
            total += chance * (1 - refused)
    return total


def replay(case: Case) -> dict[str, Tensor]:
    """Acceptance probabilities by enumeration, and the recorded runs."""
    data = case.inputs
    p, q = data["p"].double(), data["q"].double()
    out = {}
    for name, replace in (("with", True), ("without", False)):
        rows = [[acceptance(a, b, int(k), replace) for k in data["K"]] for a, b in zip(p, q, strict=True)]
        out[f"accept_prob_{name}_replacement"] = torch.tensor(rows, dtype=torch.float64)
    results = []
    runs = zip(
        data["run_pair"].tolist(), data["run_candidates"].tolist(), data["run_uniforms"].double().tolist(),
        data["run_residual_uniform"].double(), strict=True,
    )  # fmt: skip
    for pair, drawn, uniforms, last in runs:
        accept, rest = recursive(q[pair], drawn, without(p[pair], drawn))
        results.append(outcome(drawn, accept, rest, uniforms, last))
    out["run_result"] = torch.tensor(results)
    return out


def outcome(drawn: list[int], accept: list[float], rest: Tensor, uniforms: list[float], last: Tensor) -> list[int]:
    """[accepted child or -1, token] of one run with recorded uniform numbers."""
    for i, (token, chance, u) in enumerate(zip(drawn, accept, uniforms, strict=True)):
        if u <= chance:
            return [i, token]
    index = int(torch.searchsorted(rest.cumsum(0), last, right=True))
    return [-1, min(index, len(rest) - 1)]
