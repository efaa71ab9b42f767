"""METAGENE-1: embeddings over real tokens, context stuffing, the z-loss and its initialisation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from zoo.config import from_dict, to_dict
from zoo.convert import metagene
from zoo.convert.parity import Case
from zoo.errors import ZooError
from zoo.models.metagene import METAGENE, METAGENEConfig, stuff
from zoo.nn.layout import Layout
from zoo.nn.losses import max_z_loss

SMALL = {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "vocab_size": 64, "max_len": 40}


def build(**changes: object) -> METAGENE:
    torch.manual_seed(1)
    model = METAGENE(from_dict(METAGENEConfig, {**SMALL, **to_dict(changes)})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def test_embeddings_average_real_tokens_alone() -> None:
    model = build()
    ids, valid = torch.randint(5, 64, (3, 14)), torch.arange(14) < torch.tensor([[14], [6], [9]])
    got = model.embed_reads(ids.masked_fill(~valid, 0), valid)
    for row, real, mean in zip(ids, valid, got, strict=True):
        torch.testing.assert_close(mean, model.forward_features(row[real][None])[0][0].mean(0), rtol=1e-4, atol=1e-5)
    published = METAGENE(from_dict(METAGENEConfig, {**SMALL, "padding": "eager"})).eval()
    published.load_state_dict(model.state_dict())
    padded = published.embed_reads(ids.masked_fill(~valid, 0), valid, pads_count=True)
    torch.testing.assert_close(padded[0], got[0], rtol=1e-4, atol=1e-5)
    assert (padded[1:] - got[1:]).abs().amax(1).min() > 1e-2
    with pytest.raises(ZooError, match=r"41 tokens.*at most 40"):
        model.embed_reads(torch.zeros(1, 41, dtype=torch.long))


@torch.no_grad()
def test_stuffed_reads_do_not_see_each_other() -> None:
    model = build(max_len=None)
    reads = [torch.randint(5, 64, (n,)) for n in (7, 12, 3, 16, 5)]
    ids, segment, valid = stuff(reads, 20)
    assert ids.shape == (3, 20)
    assert int(valid.sum()) == 43
    hidden, _ = model.forward_features(ids, Layout("causal", segment=segment, valid=valid))
    assert not hidden[~valid].any()
    for number, read in enumerate(reads):
        for row in range(3):
            here = (segment[row] == number) & valid[row]
            if not here.any():
                continue
            part = ids[row][here]
            if len(part) == len(read):
                assert torch.equal(part, read)
            alone, _ = model.forward_features(part[None])
            torch.testing.assert_close(hidden[row][here], alone[0], rtol=1e-4, atol=1e-5)
    # not resetting the positions at each read is the same, since attention sees only their differences
    running = torch.arange(20).expand(3, 20)
    again, _ = model.forward_features(ids, Layout("causal", segment=segment, valid=valid, position=running))
    torch.testing.assert_close(again, hidden, rtol=1e-3, atol=1e-4)
    joined, _ = model.forward_features(ids, Layout("causal", valid=valid))
    assert (joined - hidden).abs().max() > 1e-2


def test_stuffing_is_that_of_packed_rows_in_the_gradient_too() -> None:
    model = build(max_len=None)
    reads = [torch.randint(5, 64, (n,)) for n in (7, 12)]
    ids, segment, _ = stuff(reads, 19)
    model.forward_features(ids, Layout("causal", segment=segment))[0].square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for read in reads:
        model.forward_features(read[None])[0].square().sum().backward()
    for name, grad in together.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-3, atol=1e-3)


def test_the_z_loss() -> None:
    logits = (3 * torch.randn(2, 5, 9)).requires_grad_()
    targets = torch.randint(0, 9, (2, 5))
    targets[0, 1] = -100
    ce, z = max_z_loss(logits, targets, weight=0.5)
    torch.testing.assert_close(ce, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    top = [float(logits[i, j].max()) for i in range(2) for j in range(5) if (i, j) != (0, 1)]
    assert math.isclose(float(z), 0.5 * sum(t * t for t in top) / 10, rel_tol=1e-5)
    (grad,) = torch.autograd.grad(z, logits)
    assert int((grad != 0).sum()) == 9


def test_initial_weights_follow_depth_and_width() -> None:
    torch.manual_seed(0)
    model = METAGENE(from_dict(METAGENEConfig, {**SMALL, "d_model": 256, "d_inner": 512, "n_layer": 4}))
    inner, outer = math.sqrt(2 / (5 * 256)), 1 / (math.sqrt(256) * 4)
    state = model.state_dict()
    for name, std in (
        ("embed.weight", inner),
        ("head.weight", inner),
        ("backbone.layers.3.mixer.qkv.weight", inner),
        ("backbone.layers.0.mlp.gate_up.weight", inner),
        ("backbone.layers.0.mixer.out_proj.weight", outer),
        ("backbone.layers.2.mlp.down.weight", outer),
    ):
        assert math.isclose(float(state[name].std()), std, rel_tol=0.05), name


def test_a_replay_reads_whole_reads_where_the_case_has_them_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    reads = ["ACGTTGCANGGATTACA" * 3, "GGGCATTATTACGCGCGAAAT"]
    case = Case(tmp_path / "held" / "case")
    case.path.mkdir(parents=True)
    (case.path / "case.json").write_text(json.dumps({"system": "metagene", "reads": reads}))
    home = tmp_path / "elsewhere" / "goldens" / "metagene"
    home.mkdir(parents=True)
    shutil.copy(shared / "goldens" / "metagene" / "tokenizer.json", home)
    monkeypatch.chdir(home.parent.parent)
    (tokenizer,) = metagene._tokenizers(case)
    rows = [torch.from_numpy(tokenizer.encode(read)) for read in reads]
    length = min(map(len, rows)) - 1
    ids = torch.stack([row[1 : 1 + length] for row in rows])
    for got, want in zip(metagene._wrapped(case, ids), rows, strict=True):
        assert got.equal(want)
    ids[0, 0] = 9  # rows that the reads do not give are taken as they are
    first, second = metagene._wrapped(case, ids)
    assert len(first) == length + 2
    assert second.equal(rows[1])
