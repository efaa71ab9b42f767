"""DNABERT-2: no work on padding and no trace of it, any length, the heads and the published rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import from_dict, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config, masked_lm_loss, masked_logits
from zoo.nn.heads import HeadConfig
from zoo.nn.kernels import shared
from zoo.nn.layout import Layout
from zoo.nn.packing import pack
from zoo.nn.positions import alibi_slopes

SMALL = DNABERT2Config(d_model=24, n_layer=2, n_head=3, d_inner=20, vocab_size=40)


def build(**changes: object) -> DNABERT2:
    torch.manual_seed(1)
    model = DNABERT2(from_dict(DNABERT2Config, {**to_dict(SMALL), **to_dict(changes)})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch(lengths: list[int], side: str = "right") -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    ids, valid = torch.randint(5, 40, (len(lengths), longest)), torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, n in zip(valid, lengths, strict=True):
        row[slice(0, n) if side == "right" else slice(longest - n, longest)] = True
    return ids.masked_fill(~valid, 3), valid


def written_out(model: DNABERT2, ids: Tensor) -> Tensor:
    """The hidden states of one sequence [L], from the equations alone."""
    state = model.state_dict()
    cfg = model.config
    width, n = cfg.d_model // cfg.n_head, len(ids)
    x = F.layer_norm(state["embed.weight"][ids] + state["embed_type.weight"][0], (cfg.d_model,),
                     state["embed_norm.weight"], state["embed_norm.bias"], cfg.eps)  # fmt: skip
    place = torch.arange(n)
    for i in range(cfg.n_layer):
        w = {
            k.removeprefix(f"backbone.layers.{i}."): v
            for k, v in state.items()
            if k.startswith(f"backbone.layers.{i}.")
        }
        q, k, v = (x @ w["mixer.qkv.weight"].T + w["mixer.qkv.bias"]).view(n, 3, cfg.n_head, width).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        scores = scores - torch.tensor(alibi_slopes(cfg.n_head))[:, None, None] * (place[:, None] - place).abs()
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        y = y @ w["mixer.out_proj.weight"].T + w["mixer.out_proj.bias"]
        x = F.layer_norm(x + y, (cfg.d_model,), w["norm1.weight"], w["norm1.bias"], cfg.eps)
        gate, up = (x @ w["mlp.gate_up.weight"].T).chunk(2, -1)
        y = (F.gelu(gate) * up) @ w["mlp.down.weight"].T + w["mlp.down.bias"]
        x = F.layer_norm(x + y, (cfg.d_model,), w["norm2.weight"], w["norm2.bias"], cfg.eps)
    return x


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_each_row_is_computed_as_if_alone_and_padding_is_zero(side: str) -> None:
    model = build()
    ids, valid = batch([9, 30, 9, 17, 1, 30], side)
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    assert not hidden[~valid].any()
    for row, real, got in zip(ids, valid, hidden, strict=True):
        torch.testing.assert_close(got[real], written_out(model, row[real]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@torch.no_grad()
def test_holes_in_the_mask_close_up(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and not, valid tokens see each other at the distances they have without the holes, and nothing else."""
    model = build()
    ids, valid = torch.randint(5, 40, (5, 26)), torch.rand(5, 26) > share
    valid[:, 3], valid[0, :2], valid[1, -4:] = True, False, False
    valid[2] = True
    assert (valid[:, 1:] & ~valid[:, :-1]).sum() > 3, "there are holes"
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr("zoo.models.packed.pack", lambda *_: None)
        hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
        assert not hidden[~valid].any()
        other, _ = model.forward_features(torch.where(valid, ids, 7), Layout("full", valid=valid))
        assert torch.equal(hidden, other), "what stands in a hole is never read"
        for row, real, got in zip(ids, valid, hidden, strict=True):
            torch.testing.assert_close(got[real], written_out(model, row[real]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_see_no_padding_and_share_one_plan() -> None:
    model, (ids, valid) = build(), batch([9, 30, 9, 17])
    packed = pack(Layout("full", valid=valid), model.backbone, ids)
    assert packed is not None
    assert packed.take(ids).shape == (1, 65)
    assert torch.equal(packed.put_back(packed.take(ids[..., None])), (ids * valid)[..., None])
    place, lengths = shared(packed.layout, ("documents", 1, 65), lambda: pytest.fail("documents were sought again"))
    assert place is None
    assert lengths == [9, 9, 17, 30]
    seen = []
    model.backbone.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    model(ids, valid)
    assert seen == [(1, 65, 24)]


@torch.no_grad()
def test_any_length_and_its_memory() -> None:
    model = build(n_layer=1)
    ids = torch.randint(5, 40, (1, 1500))  # the published buffer starts at 512
    hidden, _ = model.forward_features(ids)
    torch.testing.assert_close(hidden[0], written_out(model, ids[0]), rtol=1e-4, atol=1e-5)
    limited = build(max_len=100)
    with pytest.raises(ZooError, match=r"1500 tokens.*at most 100"):
        limited(ids)


def test_gradients_are_those_of_single_rows() -> None:
    model = build(dropout=0.0)
    ids, valid = batch([8, 13])
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    hidden.square().sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(written_grad(model, row[real]) for row, real in zip(ids, valid, strict=True)).backward()
    for name, grad in together.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-3, atol=1e-4)


def written_grad(model: DNABERT2, ids: Tensor) -> Tensor:
    return model.forward_features(ids[None])[0].square().sum()


def test_masked_language_model() -> None:
    model, (ids, valid) = build(), batch([12, 20])
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 7], labels[1, 2] = 17, 5, 0
    logits = model(ids, valid)
    assert logits.shape == (2, 20, 40)
    assert masked_logits(model, ids, labels, valid).shape == (2, 40)
    torch.testing.assert_close(masked_logits(model, ids, labels, valid)[0], logits[0, 3], rtol=1e-4, atol=1e-5)
    three = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(masked_lm_loss(logits, labels), three)
    two = F.cross_entropy(torch.stack([logits[0, 3], logits[1, 7]]), torch.tensor([17, 5]))
    torch.testing.assert_close(masked_lm_loss(logits, labels, official=True), two)
    masked_lm_loss(logits, labels).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name


@torch.no_grad()
def test_heads_can_be_exchanged() -> None:
    model, (ids, valid) = build(), batch([12, 20], "left")
    for kind, pooling, shape in (
        ("sequence", "first", (2, 3)),
        ("sequence", "mean", (2, 3)),
        ("token", "last", (2, 20, 3)),
        ("lm", "last", (2, 20, 40)),
    ):
        model.reset_head(3, kind, pooling)
        assert model(ids, valid).shape == shape
        assert (model.pooler is not None) == (kind == "sequence" and pooling == "first")
        assert (model.transform is not None) == (kind == "lm")
        again = DNABERT2(model.config)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again.eval()(ids, valid), model(ids, valid))
    model.reset_head(2, "sequence", "first")
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    first = torch.stack([hidden[0, 8], hidden[1, 0]])
    want = model.head.weight @ torch.tanh(model.pooler(first)).T + model.head.bias[:, None]
    torch.testing.assert_close(model(ids, valid), want.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_mixers_and_bad_ones() -> None:
    ids, valid = batch([12, 20])
    model = build(mixer="s4d", mixer_options={"d_state": 4, "bidirectional": True})
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    assert not hidden[~valid].any()
    assert torch.isfinite(hidden).all()
    with pytest.raises(ConfigError, match="full"):
        build(mixer="mamba2", mixer_options={"head_dim": 8})


def test_the_quirk_of_the_padding_index() -> None:
    model = DNABERT2(from_dict(DNABERT2Config, {**to_dict(SMALL), "padding_idx": 0}))
    assert not model.embed.weight[0].any()
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.config.head == HeadConfig()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiles_without_a_graph_break() -> None:
    model = build()
    ids = torch.randint(5, 40, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)
