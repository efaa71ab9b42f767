"""Drafts change nothing: the verifier's law by enumeration and by sampling, and every source of guesses."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.chain import ModelDraft
from zoo.generate.contexts import ContextTable
from zoo.generate.draft import TABLE_TREE, TokenTable, Tree, balanced_tree, optimal_tree
from zoo.generate.engine import GenerateConfig, generate
from zoo.generate.noise import Noise
from zoo.generate.samplers import Temperature, draw
from zoo.generate.trie import Lookahead, Trie
from zoo.generate.verify import Draft, recursive, spectr, verify
from zoo.models.decoder import Decoder, DecoderConfig
from zoo.models.lm import LM, LMConfig

SIZE = 4
VOCAB = 23


def decoder(**changes: Any) -> Decoder:
    fields = {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 48, "vocab_size": VOCAB}
    return Decoder(DecoderConfig(**{**fields, "init_std": 0.3, **changes}))


def prompts() -> tuple[Tensor, Tensor]:
    """Prompts of unlike length."""
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, 6:] = False
    return ids, valid


def laws(count: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    raw = torch.rand(count, SIZE, generator=source, dtype=torch.float64) ** 3
    raw[raw < 0.02] = 0  # banned tokens
    return raw / raw.sum(-1, keepdim=True)


def without(p: Tensor, drawn: tuple[int, ...]) -> list[Tensor]:
    out = []
    for token in drawn:
        out.append(p)
        p = p.clone()
        p[token] = 0
        p = p / p.sum() if p.sum() > 0 else p
    return out


@pytest.mark.parametrize("kind", ["independent", "distinct", "point", "spectr"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_nodes_output_has_the_targets_law(kind: str, count: int) -> None:
    for seed in range(40):
        p, q = laws(2, 100 * count + seed)
        if seed == 0:
            q = p
        if kind == "distinct" and int((p > 0).sum()) < count:
            continue  # there are not so many distinct tokens
        output = torch.zeros(SIZE, dtype=torch.float64)
        for drawn in itertools.product(range(SIZE), repeat=count):
            own: list[Tensor | None] = [p] * count
            if kind == "distinct":
                own = without(p, drawn)
            if kind == "point":  # however certain guesses are made, say uniformly
                own, chance = [None] * count, SIZE**-count
            else:
                chance = math.prod(float(law[token]) for token, law in zip(drawn, own, strict=True))
            if not chance:
                continue
            accept, rest = (spectr if kind == "spectr" else recursive)(q, drawn, own)
            for token, probability in zip(drawn, accept, strict=True):
                output[token] += chance * probability
                chance *= 1 - probability
            output += chance * rest
        assert torch.allclose(output, q, atol=1e-12), (kind, seed)


class Toy:
    """A target over short contexts, and a draft that is another one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def law(self, context: tuple[int, ...]) -> Tensor:
        return laws(1, hash((self.seed, *context)) % 1_000_003)[0]


def drafted(toy: Toy, noise: Noise, kind: str) -> tuple[list[int], bool]:
    """Two tokens or more from a tree of two levels, two children each."""
    draft = Draft(laws=None if kind == "point" else [])
    for node, context in ((-1, ()), (0, None), (1, None)):
        context = () if context == () else (draft.tokens[node],)
        law = toy.law(context)
        for _ in range(2):
            token = int(law.argmax()) if kind == "point" else draw(law, noise)
            draft.tokens.append(token)
            draft.parent.append(node)
            if draft.laws is not None:
                draft.laws.append(law)
            if kind in ("distinct", "point"):
                law = law.clone()
                law[token] = 0
                law = law / law.sum()
    return draft, noise


@pytest.mark.parametrize("kind", ["independent", "distinct", "point", "spectr"])
def test_sampled_trees_have_the_targets_law(kind: str) -> None:
    target, toy, count, noise = Toy(1), Toy(2), 2000, Noise(3)
    seen: Counter[tuple[int, int]] = Counter()
    lengths = 0
    for _ in range(count):
        draft, _ = drafted(toy, noise, kind)
        contexts = [()] + [
            (token,) if up < 0 else (draft.tokens[up], token)
            for token, up in zip(draft.tokens, draft.parent, strict=True)
        ]
        q = torch.stack([target.law(context) for context in contexts])
        path, token = verify(draft, q, noise, spectr if kind == "spectr" else recursive)
        out = [draft.tokens[node] for node in path] + [token]
        lengths += len(out)
        if len(out) == 1:
            out.append(draw(target.law(tuple(out)), noise))
        seen[(out[0], out[1])] += 1
    assert lengths > 1.2 * count
    statistic, cells = 0.0, 0
    for pair in itertools.product(range(SIZE), repeat=2):
        expected = count * float(target.law(())[pair[0]] * target.law(pair[:1])[pair[1]])
        if expected == 0:
            assert not seen[pair]
        elif expected > 5:
            statistic += (seen[pair] - expected) ** 2 / expected
            cells += 1
    assert statistic < cells + 5 * math.sqrt(2 * cells), (statistic, cells)


def recurrent() -> LM:
    torch.manual_seed(11)
    return LM(LMConfig(d_model=16, vocab_size=VOCAB, mixer="mamba2", options={"d_state": 8, "head_dim": 8}))


def small() -> object:
    torch.manual_seed(11)
    return decoder(d_model=16, n_layer=1)


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 1, 2), (3,)])
@pytest.mark.parametrize("draft_kind", ["attention", "mamba2"])
@pytest.mark.parametrize("sampling", ["greedy", "independent", "distinct"])
def test_model_drafts_leave_greedy_output(widths: tuple[int, ...], draft_kind: str, sampling: str) -> None:
    torch.manual_seed(3)
    model = decoder().eval()
    draft_model = small() if draft_kind == "attention" else recurrent()
    ids, valid = prompts()
    cfg = GenerateConfig(max_new_tokens=15)
    want = generate(model, ids, valid, cfg)
    got = generate(model, ids, valid, cfg, draft=ModelDraft(draft_model, widths, sampling))
    assert torch.equal(got.ids, want.ids)
    same = generate(model, ids, valid, cfg, draft=ModelDraft(model, widths, "greedy"))
    assert torch.equal(same.ids, want.ids)
    assert same.stats.tokens_per_forward > len(widths)  # its own guesses are right


@pytest.mark.parametrize(("sampling", "rule"), [("independent", spectr), ("distinct", recursive)])
def test_sampling_with_a_model_draft_keeps_the_law(sampling: str, rule: object) -> None:
    torch.manual_seed(3)
    model = decoder(vocab_size=5, init_std=0.6).eval().double()
    torch.manual_seed(4)
    draft_model = decoder(vocab_size=5, d_model=16, n_layer=1, init_std=0.6).eval().double()
    ids = torch.tensor([[1, 2, 3, 4, 0]])
    count = 300
    cfg = GenerateConfig(max_new_tokens=2, temperature=0.8, num_return_sequences=count, draft_budget=6)
    strategy = ModelDraft(draft_model, (2, 1), sampling, [Temperature(0.8)])
    out = generate(model, ids, config=cfg, draft=strategy, rule=rule)
    with torch.no_grad():
        first = (model(ids)[0, -1] / 0.8).softmax(-1)
        second = torch.stack(
            [(model(torch.cat([ids[0], torch.tensor([a])])[None])[0, -1] / 0.8).softmax(-1) for a in range(5)]
        )
    expected = count * first[:, None] * second
    seen = torch.zeros(5, 5, dtype=torch.float64)
    for a, b in out.ids.tolist():
        seen[a, b] += 1
    large = expected > 5
    statistic = float((((seen - expected) ** 2 / expected)[large]).sum())
    cells = int(large.sum())
    assert statistic < cells + 5 * math.sqrt(2 * cells)


def test_the_trie_drafts_what_it_has_seen() -> None:
    torch.manual_seed(3)
    model = decoder().eval()
    ids, valid = prompts()
    cfg = GenerateConfig(max_new_tokens=25)
    want = generate(model, ids, valid, cfg)
    strategy = Lookahead(branch=4)
    first = generate(model, ids, valid, cfg, draft=strategy)
    again = generate(model, ids, valid, cfg, draft=strategy)
    assert torch.equal(first.ids, want.ids)
    assert torch.equal(again.ids, want.ids)
    assert again.stats.tokens_per_forward > first.stats.tokens_per_forward
    assert again.stats.tokens_per_forward > 2  # every output has been seen


def test_trie_forgets_prompts_and_cuts_at_the_end() -> None:
    trie = Trie(eos=9)
    trie.put([1, 2, 3, 1, 2, 4, 9, 7, 8], 3, prompt=0)
    assert trie.query([1, 2], 8, 3, prompt=0).tokens == [2, 3, 1, 4]
    assert trie.query([8], 8, 3).tokens == [8]
    assert [node.pair(0) for node in trie.roots[1].below.values()] == [(2, 0)]
    trie.forget(0)
    assert not list(trie.roots[1].walk(0))
    trie.stream([1, 2, 5], 3, prompt=1)
    assert not list(trie.roots[1].walk(0))  # branches are not full yet
    trie.stream([6, 6], 3, prompt=1, final=True)
    assert [node.pair(0) for node in trie.roots[1].walk(0)] == [(0, 1)] * 3
    assert trie.branch([1, 2], 4, mode="output") == [2, 5, 6]


def test_trees() -> None:
    tree = Tree.of([[1], [0], [0, 1], [0, 0], [1, 0]])
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0))
    assert tree.parent == (-1, -1, 0, 0, 1)
    assert tree.level == (0, 2, 5)
    assert tree.cut(3).paths == ((0,), (1,), (0, 0))
    with pytest.raises(ZooError, match="no parent"):
        Tree.of([[0], [1, 0]])
    assert len(balanced_tree([2, 3])) == 8
    accuracy = torch.tensor([[0.6, 0.3], [0.5, 0.1]])
    paths = optimal_tree(accuracy, 4)
    assert paths == [(0,), (0, 0), (1,), (1, 0)]
    products = {path: math.prod(float(accuracy[d, r]) for d, r in enumerate(path)) for path in balanced_tree([2, 2])}
    best = max(sum(products[path] for path in chosen) for chosen in itertools.combinations(products, 4))
    assert sum(products[path] for path in paths) == pytest.approx(best)
    assert len(Tree.of(TABLE_TREE).paths) == 12


def test_the_table_holds_no_more_than_its_rows() -> None:
    table = TokenTable(VOCAB, width=5)
    torch.manual_seed(3)
    generate(decoder().eval(), prompts()[0], draft=table)
    assert table.table.shape == (VOCAB, 5)
    assert (table.table.sum(1) > 0).any()


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "top_k": 6}])
def test_context_tables_change_nothing(changes: dict) -> None:
    model, (ids, valid) = decoder().double().eval(), prompts()
    table = ContextTable((4, 2, 1), node_cost=0.01, entry_cost=0.0)
    cfg = GenerateConfig(max_new_tokens=20, **changes)
    plain = generate(model, ids, valid, cfg)
    for _ in range(2):
        drafted = generate(model, ids, valid, cfg, draft=table)
        assert torch.equal(drafted.ids, plain.ids)
    assert sum(drafted.stats.accepted) > 0  # it has seen these contexts the first time


def test_a_context_table_guesses_only_what_pays() -> None:
    table = ContextTable((2, 1), width=2, node_cost=0.1, entry_cost=0.2)
    session = table.session([], Noise(0), 64)
    assert not session.propose([1, 2], 8)  # nothing is known
    table.learn((1, 2), [3, 4])
    table.learn((2, 3), [1, 0])
    table.right[0], table.trials[0] = [9.0, 0.5], 10.0
    draft = session.propose([1, 2], 8)
    assert draft.tokens[:2] == [3, 1]
    assert draft.parent[:2] == [-1, 0]
    assert 4 not in draft.tokens  # right one time in twenty: a tenth of a pass is too much for it
    assert len(session.propose([1, 2], 1)) == 1
    table.right[0] = [0.5, 0.1]
    assert not session.propose([1, 2], 8)
    assert table.look((7, 3)) == (1, [1, 0])  # a shorter context
