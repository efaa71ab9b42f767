"""Lookahead's trie (alipay/PainlessInferenceAcceleration) against its parity cases."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.generate.trie import Branches, Trie


def replay(case: Case) -> dict[str, Tensor]:
    """Insert prompt and output, then every query as a tree, as parallel branches and as one branch."""
    config = case.config
    size, length = int(config["decoding_length"]), int(config["branch_length"])
    trie = Trie(eos=2)
    trie.put(case.inputs["prompt"].tolist(), length, 0)
    trie.stream(case.inputs["output"].tolist(), length, 0)
    out: dict[str, Tensor] = {}
    for i, query in enumerate(config["queries"]):
        key, mode = [int(token) for token in query["key"]], query["mode"]
        least = int(query.get("min_input_size", 0)), int(query.get("min_output_size", 0))
        tree = trie.query(key, size, length, *least, mode=mode)
        out |= _tensors(f"hier_{{}}_{i}", tree, torch.int64)
        out |= _tensors(f"par_{{}}_{i}", tree.parallel(), torch.float64)
        out[f"one_ids_{i}"] = torch.tensor(trie.branch(key, length, mode))
    return out


def _tensors(name: str, branches: Branches, dtype: torch.dtype) -> dict[str, Tensor]:
    ids, mask = torch.tensor(branches.tokens), torch.tensor(branches.mask(), dtype=dtype)
    return {name.format("ids"): ids, name.format("mask"): mask}
