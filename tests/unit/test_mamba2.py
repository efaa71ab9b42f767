"""Mamba-2 against its recurrence, and the converter's bijection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.convert.mamba2 import config_from_official, table, to_official, to_zoo
from zoo.errors import ConfigError, ZooError
from zoo.models.lm import LM
from zoo.nn.backbone import make_mixer
from zoo.nn.layout import CAUSAL, Layout
from zoo.nn.ssd import ssd


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time."""
    per = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(per, 2), c.repeat_interleave(per, 2)
    ys = []
    for t in range(x.shape[1]):
        state = state * (a * dt[:, t]).exp()[..., None, None]
        state = state + dt[:, t, :, None, None] * x[:, t, ..., None] * b[:, t, :, None]
        ys.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("length", [1, 7, 16, 50])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [4, 16])
def test_chunked_form_is_the_recurrence(length: int, groups: int, chunk: int) -> None:
    double = {"dtype": torch.float64}
    x, dt = torch.randn(2, length, 4, 3, **double), torch.rand(2, length, 4, **double)
    b, c = torch.randn(2, length, groups, 5, **double), torch.randn(2, length, groups, 5, **double)
    a, start = -torch.rand(4, **double), torch.randn(2, 4, 3, 5, **double)
    y, end = ssd(x, dt, a, b, c, start, chunk)
    want, last = recurrence(x, dt, a, b, c, start)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-10)
    fresh, _ = ssd(x, dt, a, b, c, None, chunk)
    torch.testing.assert_close(fresh, recurrence(x, dt, a, b, c, torch.zeros_like(start))[0], rtol=1e-9, atol=1e-10)


def test_gradients_of_the_chunked_form() -> None:
    shapes = [(1, 6, 2, 2), (1, 6, 2), (2,), (1, 6, 1, 2), (1, 6, 1, 2), (1, 2, 2, 2)]
    inputs = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda x, dt, a, b, c, s: ssd(x, dt, -a, b, c, s, 4), inputs)
    skip = torch.randn(inputs[0].shape[2], dtype=torch.float64, requires_grad=True)
    x, dt, a, *rest = inputs
    y, _ = ssd(x, dt, -a, *rest, 4, skip)
    torch.testing.assert_close(y, ssd(x, dt, -a, *rest, 4)[0] + skip[:, None] * x)
    assert torch.autograd.gradcheck(lambda skip, x, dt: ssd(x, dt, -a, *rest, 4, skip)[0], (skip, x, dt))


def test_a_strong_decay_neither_overflows_nor_leaks() -> None:
    x, dt = torch.randn(1, 300, 1, 4), torch.full((1, 300, 1), 50.0)
    b = c = torch.randn(1, 300, 1, 4)
    x.requires_grad_()
    y, _ = ssd(x, dt, torch.tensor([-16.0]), b, c, None, 64)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    alone = 50 * x * (b * c).sum(-1, keepdim=True)
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-4)


def test_heads_must_fit() -> None:
    with pytest.raises(ConfigError, match="head_dim 64"):
        make_mixer("mamba2", 24, {})


@pytest.mark.slow
def test_bfloat16_at_sixteen_thousand() -> None:
    mixer = make_mixer("mamba2", 16, {"d_state": 16, "head_dim": 16}).to(torch.bfloat16)
    with torch.no_grad():
        y, _ = mixer(torch.randn(1, 1 << 14, 16, dtype=torch.bfloat16), CAUSAL)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


OFFICIAL = {
    "hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "num_hidden_layers": 2,
    "vocab_size": 11, "chunk_size": 8, "tie_word_embeddings": True, "time_step_limit": [0.0, float("inf")],
}  # fmt: skip


def test_conversion_is_a_bijection() -> None:
    config = config_from_official(OFFICIAL)
    state = LM(config).state_dict()
    official = to_official(state, config)
    assert list(official) == [row.official for row in table(config)]
    assert torch.equal(official["lm_head.weight"], official["backbone.embeddings.weight"])
    back = to_zoo(official, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ZooError, match="unknown"):
        to_zoo({**official, "backbone.layers.0.mixer.E": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match="num_heads"):
        config_from_official({**OFFICIAL, "num_heads": 5})


def test_model_decodes_what_it_computes_at_once() -> None:
    model = LM(config_from_official(OFFICIAL)).eval()
    ids = torch.randint(0, 11, (2, 19))
    valid = torch.ones(2, 19, dtype=torch.bool)
    valid[1, :6] = False
    with torch.no_grad():
        whole, _ = model.forward_features(ids, Layout("causal", valid=valid))
        state = model.init_state(2, 19)
        first, state = model.forward_features(ids[:, :10], Layout("causal", valid=valid[:, :10]), state)
        rest, state = model.forward_features(ids[:, 10:], CAUSAL, state)
    torch.testing.assert_close(torch.cat([first, rest], 1)[valid], whole[valid], rtol=1e-4, atol=1e-5)


def test_model_against_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(**{**OFFICIAL, "n_groups": 1}, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    peer = transformers.Mamba2ForCausalLM(config).eval()
    ours = config_from_official(config.to_dict())
    model = LM(ours).eval()
    model.load_state_dict(to_zoo(peer.state_dict(), ours))
    ids = torch.randint(0, 11, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), peer(ids).logits, rtol=1e-3, atol=1e-4)


def test_long_sequences_by_spans_give_the_same_numbers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = make_mixer("mamba2", 8, {"d_state": 4, "head_dim": 4, "chunk": 4}).double()
    x = torch.randn(2, 45, 8, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x, CAUSAL)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    monkeypatch.setattr("zoo.nn.ssd.SPAN", 8)
    again, _ = mixer(x, CAUSAL)
    (other,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other, grad, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, CAUSAL)[0], y, rtol=1e-10, atol=1e-12)
