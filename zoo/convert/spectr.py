"""SpecTr's k-sequential selection (arXiv:2310.15141) against its parity cases."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.convert.rsd import outcome
from zoo.generate.verify import spectr, spectr_factor


def optimum(p: Tensor, q: Tensor, count: int) -> float:
    """The largest P(Y among the candidates) that any coupling reaches, *count* independent candidates from p, Y from q.

    A transport of the candidates' mass to tokens they contain; by max-flow = min-cut it is the least over sets S of
    tokens of q(S) + P(not all candidates in S).
    """
    size = len(p)
    bits = torch.arange(1 << size)[:, None] >> torch.arange(size)
    inside = (bits & 1).double()  # [2^V, V]
    return float((inside @ q + 1 - (inside @ p) ** count).min())


def replay(case: Case) -> dict[str, Tensor]:
    """Division factors, the law after all rejections, the optimum and the recorded runs."""
    data = case.inputs
    p, q, counts = data["p"].double(), data["q"].double(), data["K"].tolist()
    pairs = list(zip(p, q, strict=True))
    factors = torch.tensor([[spectr_factor(a, b, k) for k in counts] for a, b in pairs], dtype=torch.float64)
    out = {"rho": factors[..., 0], "beta": factors[..., 1], "accept_prob": factors[..., 2]}
    even = torch.full_like(p[0], 1 / p.shape[1])  # the convention where no rejection can happen
    rests = [
        [even if factors[i, j, 2] > 1 - 1e-12 else spectr(b, [0] * k, [a] * k)[1] for j, k in enumerate(counts)]
        for i, (a, b) in enumerate(pairs)
    ]
    out["residual"] = torch.stack([torch.stack(row) for row in rests])
    best = torch.tensor([[optimum(a, b, k) for k in counts] for a, b in pairs], dtype=torch.float64)
    # entries of -1 are marked as not solved: there is nothing to compare
    out["ot_optimum"] = torch.where(case.outputs["ot_optimum"] == -1, -1.0, best)
    results = []
    for i, pair in enumerate(data["run_pair"].tolist()):
        drawn = data["run_candidates"][i].tolist()
        accept, rest = spectr(q[pair], drawn, [p[pair]] * len(drawn))
        last = data["run_residual_uniform"][i].double()
        results.append(outcome(drawn, accept, rest, data["run_uniforms"][i].double().tolist(), last))
    out["run_result"] = torch.tensor(results)
    return out
