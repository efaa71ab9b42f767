"""GENERator: decoding with its cache, per-base losses, variant scores, heads and the chunk ensemble."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import from_dict, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.generator import (
    GENERator,
    GENERatorConfig,
    allele_probabilities,
    base_table,
    variant_score,
)
from zoo.nn.layout import Layout
from zoo.nn.losses import base_marginals, per_base_loss
from zoo.tokenizers.kmer import KmerTokenizer, KmerTokenizerConfig

SMALL = {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 24, "max_len": 64}


def build(**changes: object) -> GENERator:
    torch.manual_seed(1)
    model = GENERator(from_dict(GENERatorConfig, {**SMALL, **to_dict(changes)})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("hybrid", [(), ({"layers": [1], "options": {"window": 5, "sinks": 1}},)])
@torch.no_grad()
def test_greedy_decoding_with_the_cache_is_that_without(hybrid: tuple) -> None:
    model = build(hybrid=hybrid)
    ids, valid = torch.randint(32, 4128, (3, 11)), torch.ones(3, 11, dtype=torch.bool)
    valid[1, :4], valid[2, :9] = False, False
    state = model.init_state(3, 20)
    hidden, state = model.forward_features(ids, Layout("causal", valid=valid), state)
    tokens = [model.forward_head(hidden[:, -1:]).argmax(-1)]
    for _ in range(6):
        hidden, state = model.forward_features(tokens[-1], Layout("causal"), state)
        tokens.append(model.forward_head(hidden).argmax(-1))
    got = torch.cat(tokens, 1)
    for row in range(3):
        line = ids[row][valid[row]][None]
        for step in range(7):
            line = torch.cat([line, model(line)[:, -1:].argmax(-1)], 1)
            assert line[0, -1] == got[row, step]
    with pytest.raises(ZooError, match="at most 64"):
        model.init_state(1, 65)


def test_bases_of_tokens_are_the_tokenizers() -> None:
    table, vocabulary = base_table(), KmerTokenizer(KmerTokenizerConfig()).vocab
    for token in (0, 31, 32, 33, 1397, 2000, 4127):
        letters = vocabulary[token]
        assert table[token].tolist() == (["ATCG".index(c) for c in letters] if token >= 32 else [-1] * 6)
    assert base_table(4**3 + 5, specials=5, k=3).shape == (69, 3)


def loop_loss(logits: Tensor, targets: Tensor, quirk: bool) -> tuple[Tensor, Tensor]:
    """The per-base loss by loops over tokens and places, and the other tokens' cross-entropies / 6."""
    table = base_table()
    bases, others = [], []
    for row, target in zip(logits.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target in (0, 3, -100):
            continue
        if target < 32:
            others.append(F.cross_entropy(row[None], torch.tensor([target])) / 6)
            continue
        p = row.softmax(-1)
        for place in range(6):
            same = table[:, place] == table[target, place]
            if quirk and table[target, place] == 0:
                same = same | (table[:, place] < 0)
            bases.append(-p[same].sum().log())
    return torch.stack(bases).mean(), torch.stack(others).mean()


@pytest.mark.parametrize("quirk", [False, True])
def test_the_per_base_loss_against_loops(quirk: bool) -> None:
    logits = (3 * torch.randn(2, 7, 4128)).requires_grad_()
    targets = torch.randint(32, 4128, (2, 7))
    targets[0, 2], targets[1, 0], targets[1, 5], targets[0, 6] = 2, -100, 0, 3
    base, other = loop_loss(logits, targets, quirk)
    torch.testing.assert_close(
        per_base_loss(logits, targets, base_table(), specials_as_first=quirk, bases_only=True), base
    )
    total = per_base_loss(logits, targets, base_table(), specials_as_first=quirk)
    torch.testing.assert_close(total, (base * 10 + other) / 11)
    total.backward()
    assert torch.isfinite(logits.grad).all()
    nothing = per_base_loss(logits, torch.full_like(targets, -100), base_table())
    assert float(nothing.detach()) == 0
    parts = base_marginals(logits[0, 0], base_table(), quirk)
    assert parts.shape == (6, 4)
    whole = torch.ones(6) if quirk else logits[0, 0].softmax(-1)[32:].sum().expand(6)
    torch.testing.assert_close(parts.sum(-1), whole)


@torch.no_grad()
def test_variant_scores() -> None:
    logits = 2 * torch.randn(3, 4128)
    p = allele_probabilities(logits)
    vocabulary = KmerTokenizer(KmerTokenizerConfig()).vocab
    for i, base in enumerate("ATCG"):
        starts = torch.tensor([token.startswith(base) for token in vocabulary])
        torch.testing.assert_close(p[:, i], logits.softmax(-1)[:, starts].sum(-1))
    ref, alt = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1])
    score = variant_score(logits, ref, alt)
    torch.testing.assert_close(score, (p[range(3), ref] / (p[range(3), alt] + 1e-10)).log())
    assert (variant_score(logits, alt, ref) + score).abs().max() < 1e-5


@torch.no_grad()
def test_classification_pools_the_last_real_token_or_as_published() -> None:
    head = {"kind": "sequence", "num_outputs": 3, "bias": False}
    ids, valid = torch.randint(32, 4128, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    ids = ids.masked_fill(~valid, 3)
    right = build(head=head)
    alone = right(ids[1:, :6])
    torch.testing.assert_close(right(ids, valid)[1:], alone, rtol=1e-4, atol=1e-5)
    published = GENERator(dataclasses.replace(right.config, padding="eager", pool_pad_id=2)).eval()
    published.load_state_dict(right.state_dict())
    assert (published(ids, valid)[1:] - alone).abs().max() > 1e-2  # read at a padded position
    torch.testing.assert_close(published(ids, valid)[:1], right(ids, valid)[:1], rtol=1e-4, atol=1e-5)
    mended = GENERator(dataclasses.replace(published.config, pool_pad_id=3)).eval()
    mended.load_state_dict(right.state_dict())
    torch.testing.assert_close(mended(ids, valid)[1:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_chunk_ensemble() -> None:
    head = {"kind": "sequence", "num_outputs": 2, "bias": False}
    model = build(head=head, chunks={"size": 6, "count": 4})
    ids, valid = torch.randint(32, 4128, (2, 15)), torch.ones(2, 15, dtype=torch.bool)
    valid[1, 8:] = False
    pieces = [ids[:, :6], ids[:, 6:12], ids[:, 12:]]
    states = [model.forward_features(piece)[0] for piece in pieces]
    zero = torch.zeros(model.config.d_model)
    first = torch.stack([states[0][0, 5], states[1][0, 5], states[2][0, 2], zero])
    second = torch.stack([states[0][1, 5], states[1][1, 1], zero, zero])
    got = model.chunk_features(ids, valid)
    torch.testing.assert_close(got, torch.stack([first, second]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids, valid), got.flatten(1) @ model.chunk_head.weight.T)
    assert model(torch.randint(32, 4128, (1, 500))).shape == (1, 2)  # beyond max_len: what is left over is not read
    with pytest.raises(ConfigError, match="chunk ensemble"):
        model.reset_head(3)
    with pytest.raises(ConfigError, match="kind 'sequence'"):
        from_dict(GENERatorConfig, {"chunks": {"size": 6}})


@torch.no_grad()
def test_longer_inputs_by_yarn_or_windows_and_other_mixers() -> None:
    with pytest.raises(ZooError, match=r"100 tokens.*at most 64"):
        build()(torch.zeros(1, 100, dtype=torch.long))
    ids = torch.randint(32, 4128, (2, 100))
    rope = {"base": 500000.0, "scaling": "yarn", "factor": 2.0, "original_len": 64}
    assert torch.isfinite(build(max_len=128, rope=rope)(ids)).all()
    windowed = build(max_len=None, window=16)
    changed = ids.clone()
    changed[:, 0] = 40
    # two layers of 16 keys reach 32 tokens back
    torch.testing.assert_close(windowed(ids)[:, 33:], windowed(changed)[:, 33:])
    mamba = build(mixer="mamba2", mixer_options={"d_state": 4, "head_dim": 8, "chunk": 8})
    valid = torch.arange(50) < torch.tensor([[50], [31]])
    alone = mamba(ids[1:, :31])
    torch.testing.assert_close(mamba(ids[:, :50], valid)[1:, :31], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        build(hybrid=({"layers": [2]},))


def test_training_reaches_every_parameter() -> None:
    model = build().train()
    ids, valid = torch.randint(32, 4128, (2, 12)), torch.arange(12) < torch.tensor([[12], [7]])
    model.set_grad_checkpointing(True)
    loss = per_base_loss(model(ids, valid)[:, :-1], ids[:, 1:].masked_fill(~valid[:, 1:], -100), base_table())
    loss.backward()
    checkpointed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(False)
    per_base_loss(model(ids, valid)[:, :-1], ids[:, 1:].masked_fill(~valid[:, 1:], -100), base_table()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, checkpointed[name])
    wide = GENERator(from_dict(GENERatorConfig, SMALL)).bfloat16()
    assert torch.isfinite(wide(ids, valid)).all()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiles_without_a_graph_break() -> None:
    model, ids = build(), torch.randint(32, 4128, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)
