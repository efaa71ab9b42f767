"""Token Recycling (Luowaterbi/TokenRecycling) against its parity cases: the adjacency table as the engine's draft."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.convert.streaming_llm import tiny_llama
from zoo.generate.draft import TokenTable, Verdict
from zoo.generate.engine import GenerateConfig, generate
from zoo.models.decoder import Decoder
from zoo.nn.layout import Layout


class Recorded(TokenTable):
    """The table, and what it held before the last pass: the official loop ends without learning from that one."""

    before: Tensor

    def observe(self, verdict: Verdict) -> None:
        self.before = self.table.clone()
        super().observe(verdict)


def replay(case: Case) -> dict[str, Tensor]:
    """The tree's shape, its filling from a given table, and a whole greedy run."""
    config, ids = case.config, case.inputs["input_ids"]
    model = tiny_llama(case)
    width = int(config.get("output_id_topk", 8))
    table = Recorded(model.config.vocab_size, config["tree_template"], width)
    tree = table.tree
    table.table = case.inputs["bfs_adjacency"].clone()
    root = int(case.inputs["bfs_root"])
    father = [-1, *(up + 1 for up in tree.parent)]
    layout = Layout("causal", parent=torch.tensor([father]))
    seen = layout.dense(len(father))[0]
    depth = seen.sum(1) - 1
    out = {
        "bfs_ids": torch.tensor([root, *table.fill(root)]),
        "child_rank": torch.tensor([-1, *tree.rank]),
        "father_index": torch.tensor(father),
        "level_starts": torch.tensor([level + 1 for level in tree.level]),
        "tree_depth": depth,
        "tree_mask": seen.long(),
        "paths": _paths(father, int(depth.max())),
    }
    table.table = torch.zeros_like(table.table)
    return out | _run(model, ids, table, case.outputs["output_ids"].shape[1] - ids.shape[1])


def _paths(father: list[int], depth: int) -> Tensor:
    rows = []
    for leaf in sorted(set(range(len(father))) - set(father)):
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            node = father[node]
        rows.append(path[::-1] + [-1] * (depth + 1 - len(path)))
    return torch.tensor(rows)


def _run(model: Decoder, ids: Tensor, table: Recorded, new: int) -> dict[str, Tensor]:
    """The official loop leaves the last emitted token out of its output."""
    cfg = GenerateConfig(max_new_tokens=new + 64, draft_budget=len(table.tree.paths))
    drafted = generate(model, ids, config=cfg, draft=table, stop=[lambda tokens: len(tokens) > new])
    plain = generate(model, ids, config=GenerateConfig(max_new_tokens=new))
    return {
        "output_ids": torch.cat([ids, drafted.ids[:, :new]], 1),
        "greedy_ids": torch.cat([ids, plain.ids], 1),
        "accept_lengths": torch.tensor([count + 1 for count in drafted.stats.accepted]),
        "final_adjacency": table.before,
    }
