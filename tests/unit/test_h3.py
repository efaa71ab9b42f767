"""H3 against its definition: two recurrences and an outer product a head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.convert import rows_to_official, rows_to_ours
from zoo.convert.based_lm import config_from_official as based_config
from zoo.convert.based_lm import to_official as based_official
from zoo.convert.based_lm import to_zoo as based_ours
from zoo.convert.h3 import config_from_official, mixer_config, mixer_rows, to_official, to_zoo
from zoo.errors import ConfigError
from zoo.models.lm import LM
from zoo.nn.h3 import H3, H3Config
from zoo.nn.layout import CAUSAL
from zoo.nn.mixer import split_param_groups


def definition(layer: H3, x: Tensor) -> Tensor:
    """One token at a time: the shift's state moves a place and takes B k; the diagonal state takes the products."""
    cfg = layer.config
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    batch, length, width = x.shape
    size, heads = cfg.head_dim, layer.heads
    shift = x.new_zeros(batch, width, cfg.d_state)
    step, weights = layer.system.discrete(torch.float64)
    h = torch.zeros(batch, size, size, heads, cfg.d_state // 2, dtype=torch.complex128)
    ys = []
    for t in range(length):
        shift = torch.cat([torch.zeros_like(shift[..., :1]), shift[..., :-1]], -1) + layer.shift_b * k[:, t, :, None]
        key = (shift * layer.shift_c).sum(-1) + layer.shift_skip * k[:, t]
        key, value, query = (u.view(batch, heads, size).transpose(1, 2) for u in (key, v[:, t], q[:, t]))
        kv = key[:, :, None] * value[:, None]  # [B, dh, dh, H]
        h = step * h + kv[..., None]
        y = 2 * (weights[0] * h).sum(-1).real + layer.skip * kv
        ys.append((y * query[:, :, None]).sum(1).flatten(1))
    return layer.out_proj(torch.stack(ys, 1))


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", [1, 5, 30])
def test_layer_is_its_recurrences(head_dim: int, disc: str, length: int) -> None:
    layer = H3(6, H3Config(d_state=8, head_dim=head_dim, disc=disc)).double()
    with torch.no_grad():
        layer.shift_b.add_(0.1 * torch.randn_like(layer.shift_b))
    x = torch.randn(2, length, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, CAUSAL)[0], definition(layer, x), rtol=1e-9, atol=1e-11)


def test_a_fresh_shift_is_a_list_of_the_last_keys() -> None:
    layer = H3(4, H3Config(d_state=6))
    torch.testing.assert_close(layer.shift_kernel(torch.float32), layer.shift_c, rtol=1e-5, atol=1e-6)


def test_official_configs() -> None:
    assert mixer_config({"mode": "diag", "measure": "diag-inv", "disc": "zoh"}) == H3Config(init="inv", disc="zoh")
    with pytest.raises(ConfigError, match="nplr"):
        mixer_config({"mode": "nplr"})
    with pytest.raises(ConfigError, match="head_dim"):
        H3(6, H3Config(head_dim=4))


def test_no_decay_of_the_systems() -> None:
    layer = H3(4, H3Config(d_state=4, lr=1e-3))
    first = split_param_groups(layer)[0]
    assert (first["weight_decay"], first["lr"]) == (0.0, 1e-3)
    assert any(p is layer.system.a_imag for p in first["params"])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_conversions_are_bijections() -> None:
    layer = H3(4, H3Config(d_state=4))
    official = rows_to_official(mixer_rows("", ""), layer.state_dict(), "x")
    assert same(rows_to_ours(mixer_rows("", ""), official, "x"), layer.state_dict())
    config = config_from_official(
        {
            "d_model": 8,
            "n_layer": 3,
            "vocab_size": 13,
            "pad_vocab_size_multiple": 8,
            "attn_layer_idx": [1],
            "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 4},
            "ssm_cfg": {"d_state": 4},
        }
    )
    state = LM(config).state_dict()
    assert same(to_zoo(to_official(state, config), config), state)
    config = based_config(
        {"n_embd": 8, "n_head": 2, "n_layer": 3, "alt": [0], "alt2": [2], "feat": 2, "win": 4, "vocab": 11}
    )
    state = LM(config).state_dict()
    official = based_official(state, config)
    assert same(based_ours({f"model.{k}": v for k, v in official.items()}, config), state)
    gate, up = state["backbone.layers.0.mlp.gate_up.weight"].chunk(2)
    assert torch.equal(official["transformer.layers.0.mlp.fc1.weight"], torch.cat([up, gate]))


def test_hybrid_decodes_what_it_computes_at_once() -> None:
    config = config_from_official(
        {"d_model": 8, "n_layer": 2, "vocab_size": 13, "attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}
    )
    model = LM(config).eval()
    ids = torch.randint(0, 13, (2, 17))
    with torch.no_grad():
        whole, _ = model.forward_features(ids)
        state = model.init_state(2, 17)
        parts = []
        for part in ids.split([6, 1, 1, 9], 1):
            hidden, state = model.forward_features(part, CAUSAL, state)
            parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
