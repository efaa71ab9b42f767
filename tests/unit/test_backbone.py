"""The stack of blocks: norm order, residual precision, long feed-forwards, checkpointing, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.nn import pieces
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec, make_mixer
from zoo.nn.layout import CAUSAL
from zoo.nn.mlp import MLPConfig
from zoo.nn.state import Stack

SPEC = LayerSpec(mixer="hyena", options={"max_len": 64, "filter_width": 8}, mlp=MLPConfig(width=24))


def stack(**changes: object) -> Backbone:
    return Backbone(BackboneConfig(**{"d_model": 12, "layers": (SPEC, SPEC), **changes})).eval()  # type: ignore[arg-type]


def test_pre_norm_is_the_written_out_sum() -> None:
    net, x = stack(), torch.randn(2, 20, 12)
    with torch.no_grad():
        h = x
        for layer in net.layers:
            h = h + layer.mixer(layer.norm1(h), CAUSAL)[0]
            h = h + layer.mlp(layer.norm2(h))
        torch.testing.assert_close(net(x)[0], net.norm(h))


def test_post_norm_is_the_written_out_sum() -> None:
    net, x = stack(prenorm=False), torch.randn(2, 20, 12)
    assert isinstance(net.norm, nn.Identity)
    with torch.no_grad():
        h = x
        for layer in net.layers:
            h = layer.norm1(h + layer.mixer(h, CAUSAL)[0])
            h = layer.norm2(h + layer.mlp(h))
        torch.testing.assert_close(net(x)[0], h)


def test_a_layer_may_have_no_feed_forward() -> None:
    net = stack(layers=(LayerSpec(mixer="hyena", options=SPEC.options, mlp=None),))
    assert net.layers[0].mlp is None
    assert net(torch.randn(1, 5, 12))[0].shape == (1, 5, 12)


def test_the_residual_stream_can_stay_in_float32() -> None:
    net = stack(residual_in_fp32=True).to(torch.bfloat16)
    seen: list[torch.dtype] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out[0].dtype))
    y, _ = net(torch.randn(2, 10, 12).bfloat16())
    assert seen == [torch.float32, torch.float32]
    assert y.dtype == torch.bfloat16


def test_long_feed_forwards_are_cut_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = stack(), torch.randn(2, 50, 12, requires_grad=True)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        y, _ = net(x)
        return y, list(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))

    y, grads = run()
    monkeypatch.setattr(pieces, "PIECE", 24 * 4)
    monkeypatch.setattr(pieces, "WHOLE", 0)
    again, grads_again = run()
    torch.testing.assert_close(again, y)
    for a, b in zip(grads_again, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], y)


def test_a_state_has_one_entry_a_layer_and_continues() -> None:
    net, x = stack(), torch.randn(2, 20, 12)
    with torch.no_grad():
        state = net.init_state(2, 20)
        assert isinstance(state, Stack)
        assert len(state.layers) == 2
        first, state = net(x[:, :9], state=state)
        second, state = net(x[:, 9:], state=state)
        torch.testing.assert_close(torch.cat([first, second], 1), net(x)[0], rtol=1e-4, atol=1e-5)
    assert state is not None
    assert state.nbytes() == sum(layer.mixer.cost(20, 2).state_bytes for layer in net.layers)


def test_residual_projections_are_scaled_by_depth() -> None:
    net = stack(d_model=64, layers=(SPEC,) * 8)
    before = net.layers[0].mixer.in_proj.weight.clone()
    net.scale_residual_init(0.02)
    assert float(net.layers[3].mixer.out_proj.weight.std()) == pytest.approx(0.005, rel=0.1)
    assert float(net.layers[3].mlp.fc2.weight.std()) == pytest.approx(0.005, rel=0.1)
    assert torch.equal(before, net.layers[0].mixer.in_proj.weight)


def test_wrong_mixer_names_and_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown mixer 'heyna'.*hyena"):
        make_mixer("heyna", 8, {})
    with pytest.raises(ConfigError, match=r"ordr.*'order'"):
        make_mixer("hyena", 8, {"ordr": 3})
    with pytest.raises(ConfigError, match="causal"):
        stack(layout="full")
