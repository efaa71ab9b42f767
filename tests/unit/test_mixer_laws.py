"""The contract of every mixer in the catalogue, one suite for all. A mixer without a line in TINY fails.

To add a mixer, add a line: its name, and the options of one or more small variants (`d_model` among them if not 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import catalogue
from zoo.errors import ConfigError, ZooError
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec, make_mixer
from zoo.nn.layout import Layout
from zoo.nn.mixer import Mixer, split_param_groups

TINY: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"heads": 4, "kv_heads": 2, "rope": {}},
        {"heads": 4, "bias": True, "out_bias": True, "alibi": True},
        {"heads": 4, "kv_heads": 1, "rope": {"interleaved": True}, "window": 5},
        {"heads": 2, "alibi": True, "window": 5},
        {"heads": 4, "kv_heads": 2, "rope": {"dim": 2}, "window": 4, "sinks": 2, "qk_norm": True},
        {"heads": 4, "kv_heads": 1, "v_heads": 2, "head_dim": 6, "k_dim": 4, "v_dim": 8, "rope": {}},
    ],
    "softplus_attention": [
        {"heads": 4, "kv_heads": 2, "rope": {}, "power": 0.0},
        {"heads": 4, "rope": {}, "power": 3.0},
        {"heads": 2, "power": 2.0, "window": 5, "log_length": False},
    ],
    "hyena": [
        {"max_len": 64, "filter_width": 8},
        {"max_len": 48, "filter_width": 8, "order": 3, "interleaved": True, "learn_positions": True, "shift": 0.0},
        {"max_len": 64, "filter_width": 8, "order": 4, "short_filter": 4, "bias": False, "num_inner_mlps": 1},
        {"max_len": 64, "filter_width": 8, "short_filter": 1, "modulate": False, "train_freq": False},
        {"max_len": 64, "filter_width": 8, "bidirectional": "two_sided", "order": 3},
    ],
    "s4d": [{"d_state": 8}, {"d_state": 8, "disc": "bilinear", "init": "inv"}, {"d_state": 8, "bidirectional": True}],
    "s4": [{"d_state": 8}, {"d_state": 8, "mode": "diag"}, {"d_state": 8, "bidirectional": True, "gated": False}],
    "lssl": [{"d_state": 6}, {"d_state": 6, "channels": 2, "shared": False, "alpha": 1.0}],
    "mamba2": [
        {"d_state": 8, "head_dim": 8, "chunk": 8},
        {"d_state": 4, "head_dim": 4, "n_groups": 2, "norm_per_group": True, "bias": True, "dt_limit": [0.01, 1.0]},
    ],
    "based": [{"num_heads": 2, "feature_dim": 4, "chunk": 8}, {"num_heads": 3, "feature_dim": 3, "head_dim": 5}],
    "jrt": [{"num_heads": 2, "feature_dim": 4, "enc_length": 6, "scale_dim": 9}],
    "baseconv": [{}, {"expand": 2, "kernel": 4, "bias": False, "conv_bias": True}],
    "h3": [{"d_state": 8}, {"d_state": 6, "head_dim": 2, "disc": "zoh"}],
    "ponet": [{"num_heads": 2, "segments": 3}, {"num_heads": 4, "segments": 2, "window": 5}],
    "orchid": [
        {"max_len": 32, "filter_width": 8},
        {"max_len": 32, "filter_width": 8, "kernel": "corr", "transform": "fft", "residual": False, "actq": "gelu"},
        {"max_len": 32, "filter_width": 8, "kernel": "freq", "transform": "dct", "network": "convt"},
        {"max_len": 32, "filter_width": 8, "cut": True, "network": "convf", "padding": "reflect", "conv_layers": 2},
    ],
    "memory": [
        {"chunk": 4, "expansion": 2.0},
        {"chunk": 3, "heads": 2, "momentum_order": 2, "qk_norm": True, "refresh": 1, "expansion": 1.0},
        {"chunk": 1, "heads": 2, "head_dim": 4, "depth": 1, "refresh": 2, "max_lr": 0.1},
    ],
    "titans": [
        {"heads": 2, "window": 4, "persistent": 2, "memory": {"chunk": 4, "expansion": 1.0}},
        {"heads": 2, "window": 3, "variant": "mag", "memory": {"chunk": 4, "expansion": 1.0, "refresh": 1}},
        {"heads": 4, "window": 30, "variant": "mal", "memory": {"chunk": 5, "heads": 2, "expansion": 1.0}},
        {"variant": "lmm", "memory": {"chunk": 4, "expansion": 1.0}},
    ],
    "longvq": [
        {"num_heads": 2, "key_dim": 4, "codes": 5, "block": 4, "d_state": 8},
        {"num_heads": 4, "key_dim": 3, "codes": 3, "block": 16, "d_state": 4},
    ],
    "bidirectional": [
        {"mixer": "s4d", "options": {"d_state": 8}},
        {"mixer": "mamba2", "options": {"d_state": 8, "head_dim": 8}, "mode": "concat", "shared": True},
    ],
}
B, L = 2, 24
KINDS = ("causal", "full", "prefix", "block_causal", "window")


@dataclass
class Variant:
    """One mixer with tiny options."""

    name: str
    index: int
    options: dict[str, Any]
    d_model: int = field(init=False)

    def __post_init__(self) -> None:
        self.options = dict(self.options)
        self.d_model = self.options.pop("d_model", 16)

    def build(self, dtype: torch.dtype = torch.float32) -> Mixer:
        mixer = make_mixer(self.name, self.d_model, self.options).eval()
        with torch.no_grad():  # zero-initialised gates would hide whole branches from these tests
            for p in mixer.parameters():
                if p.is_floating_point():
                    p.add_(0.05 * torch.randn_like(p))
        return mixer.to(dtype)

    def x(self, length: int = L, batch: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch, length, self.d_model, dtype=dtype)


VARIANTS = [Variant(name, i, options) for name, variants in TINY.items() for i, options in enumerate(variants)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.name}-{v.index}")


def layout_of(kind: str, length: int = L, **fields: Any) -> Layout:
    """A layout of *kind* with what that kind needs."""
    extra: dict[str, dict[str, Any]] = {
        "prefix": {"prefix": 5},
        "block_causal": {"block": torch.arange(length) // 4},
        "window": {"window": (4, 0)},
    }
    return Layout(kind, **{**extra.get(kind, {}), **fields})  # type: ignore[arg-type]


def causal_kind(mixer: Mixer) -> str | None:
    return next((kind for kind in ("causal", "window") if kind in mixer.info.layouts), None)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance}"


def test_every_mixer_has_a_line() -> None:
    assert set(TINY) == set(catalogue.MIXERS)


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_parallel_equals_chunked_equals_stepwise(variant: Variant, dtype: torch.dtype, tolerance: float) -> None:
    mixer = variant.build(dtype)
    kind = causal_kind(mixer)
    if mixer.info.step == "none" or kind is None:
        with pytest.raises(ConfigError):
            mixer.init_state(B, L)
        return
    x, layout = variant.x(dtype=dtype), layout_of(kind)
    with torch.no_grad():
        whole, none = mixer(x, layout)
        assert none is None
        for cuts in ([5, 6, 17], [1, 2], torch.randperm(L - 1)[:4].add(1).sort().values.tolist()):
            state, parts = mixer.init_state(B, L, dtype=dtype), []
            for part in x.tensor_split(cuts, dim=1):
                y, state = mixer(part, layout, state)
                parts.append(y)
            close(torch.cat(parts, 1), whole, tolerance)
        state, steps = mixer.init_state(B, L, dtype=dtype), []
        for t in range(L):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        close(torch.stack(steps, 1), whole, tolerance)


@every
def test_a_causal_mixer_never_sees_ahead(variant: Variant) -> None:
    mixer = variant.build(torch.float64)
    kind = causal_kind(mixer)
    if kind is None:
        pytest.skip("not causal")
    x = variant.x(dtype=torch.float64).requires_grad_()
    y, _ = mixer(x, layout_of(kind))
    for t in (0, 7, L - 2):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        assert float(grad[:, t].abs().max()) > 0
        # transforms leave rounding noise where a direct sum would leave zeros
        assert float(grad[:, t + 1 :].abs().max()) <= 1e-12 * float(grad.abs().max())
        if mixer.info.receptive_field is not None and t - mixer.info.receptive_field > 0:
            before = grad[:, : t - mixer.info.receptive_field]
            assert float(before.abs().max()) <= 1e-12 * float(grad.abs().max())


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(variant: Variant, side: str) -> None:
    mixer = variant.build(torch.float64)
    for kind in sorted(mixer.info.layouts):
        if side == "left" and kind in ("prefix", "block_causal"):
            continue  # their edges are counted from the left
        pads = 6
        x = variant.x(dtype=torch.float64)
        filler = 30 * variant.x(pads, dtype=torch.float64)
        padded = torch.cat([x, filler] if side == "right" else [filler, x], dim=1)
        where = slice(0, L) if side == "right" else slice(pads, None)
        valid = torch.zeros(B, L + pads, dtype=torch.bool)
        valid[:, where] = True
        with torch.no_grad():
            alone, _ = mixer(x, layout_of(kind))
            beside, _ = mixer(padded, layout_of(kind, L + pads, valid=valid))
        close(beside[:, where], alone, 1e-9)
        assert not beside[~valid].any()


@every
def test_prompts_of_different_length_are_continued_behind_left_padding(variant: Variant) -> None:
    mixer = variant.build(torch.float64)
    kind = causal_kind(mixer)
    if mixer.info.step == "none" or kind is None:
        pytest.skip("no state")
    x = variant.x(dtype=torch.float64)
    pads, prompt = 7, 15
    padded = x.clone()
    padded[1, :pads] = 30  # row 1 is shorter
    valid = torch.ones(B, prompt, dtype=torch.bool)
    valid[1, :pads] = False
    with torch.no_grad():
        y, state = mixer(
            padded[:, :prompt], layout_of(kind, prompt, valid=valid), mixer.init_state(B, L, dtype=x.dtype)
        )
        parts = [y]
        for part in (x[:, prompt : prompt + 4], x[:, prompt + 4 :]):
            y, state = mixer(part, layout_of(kind), state)
            parts.append(y)
        joined = torch.cat(parts, 1)
        close(joined[:1], mixer(x[:1], layout_of(kind))[0], 1e-9)
        close(joined[1:, pads:], mixer(x[1:, pads:], layout_of(kind))[0], 1e-9)
    assert not joined[1, :pads].any()


@every
def test_rows_of_different_length_do_not_disturb_each_other(variant: Variant) -> None:
    mixer = variant.build(torch.float64)
    for kind in sorted(mixer.info.layouts):
        x = variant.x(dtype=torch.float64)
        valid = torch.arange(L) < torch.tensor([[L], [L - 9]])
        with torch.no_grad():
            both, _ = mixer(x, layout_of(kind, valid=valid))
            short, _ = mixer(x[1:, : L - 9], layout_of(kind, L - 9))
            full, _ = mixer(x[:1], layout_of(kind))
        close(both[1:, : L - 9], short, 1e-9)
        close(both[:1], full, 1e-9)


@every
def test_every_parameter_gets_a_gradient(variant: Variant) -> None:
    mixer = variant.build().train()
    for kind in sorted(mixer.info.layouts):  # some parameters serve one kind only
        y, _ = mixer(variant.x(), layout_of(kind))
        (y * torch.randn_like(y)).sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


@every
def test_the_state_is_as_large_as_declared(variant: Variant) -> None:
    mixer = variant.build()
    kind = causal_kind(mixer)
    if mixer.info.step == "none" or kind is None:
        assert mixer.cost(L, B).state_bytes == 0
        return
    for length in (1, 13, L):
        with torch.no_grad():
            _, state = mixer(variant.x(length), layout_of(kind), mixer.init_state(B, length))
        assert state is not None
        assert state.nbytes() == mixer.cost(length, B).state_bytes
    assert mixer.cost(2 * L).flops > mixer.cost(L).flops > 0


@every
def test_rows_of_a_state_can_be_selected(variant: Variant) -> None:
    mixer = variant.build(torch.float64)
    kind = causal_kind(mixer)
    if mixer.info.step == "none" or kind is None:
        pytest.skip("no state")
    x, rows = variant.x(dtype=torch.float64), torch.tensor([1, 1, 0])
    with torch.no_grad():
        _, state = mixer(x[:, :11], layout_of(kind), mixer.init_state(B, L, dtype=torch.float64))
        assert state is not None
        chosen = state.select(rows)
        straight, _ = mixer(x[:, 11:], layout_of(kind), state)
        branched, after = mixer(x[rows, 11:], layout_of(kind), chosen)
    close(branched, straight[rows], 1e-9)
    assert after is not None
    assert after.detach().nbytes() == after.nbytes()


@every
def test_bfloat16_stays_finite_and_near(variant: Variant) -> None:
    mixer = variant.build()
    kind = sorted(mixer.info.layouts)[0]
    x = variant.x()
    with torch.no_grad():
        exact, _ = mixer(x, layout_of(kind))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, _ = mixer(x, layout_of(kind))
        half, _ = mixer.to(torch.bfloat16)(x.bfloat16(), layout_of(kind))
    assert half.dtype == torch.bfloat16
    for y in (mixed, half):
        assert torch.isfinite(y).all()
        close(y.float(), exact, 0.15)


@every
def test_packed_documents_are_kept_apart_or_refused(variant: Variant) -> None:
    segment = (torch.arange(L) >= 9).long().expand(B, L)
    mixer = variant.build(torch.float64)
    for kind in sorted(mixer.info.layouts & {"causal", "full", "window"}):
        stack = Backbone(
            BackboneConfig(
                d_model=variant.d_model,
                layers=(LayerSpec(mixer=variant.name, options=variant.options, mlp=None),),
                layout=kind,  # type: ignore[arg-type]
            )
        ).to(torch.float64)
        x = variant.x(dtype=torch.float64)
        if not mixer.info.packing:
            with pytest.raises(ZooError, match="packed"):
                stack(x, layout_of(kind, segment=segment))
            continue
        with torch.no_grad():
            packed, _ = stack(x, layout_of(kind, segment=segment))
            first, _ = stack(x[:, :9], layout_of(kind, 9))
            second, _ = stack(x[:, 9:], layout_of(kind, L - 9))
        close(packed, torch.cat([first, second], 1), 1e-9)


@every
def test_a_layout_it_cannot_serve_is_refused_when_the_model_is_built(variant: Variant) -> None:
    served = variant.build().info.layouts
    assert served <= set(KINDS)
    for kind in KINDS:
        stack = BackboneConfig(
            d_model=variant.d_model,
            layers=(LayerSpec(mixer=variant.name, options=variant.options),),
            layout=kind,  # type: ignore[arg-type]
        )
        if kind in served:
            Backbone(stack)
        else:
            with pytest.raises(ConfigError, match=kind):
                Backbone(stack)


@every
def test_a_length_beyond_the_filter_is_refused(variant: Variant) -> None:
    mixer = variant.build()
    if not mixer.info.needs_max_len:
        pytest.skip("any length")
    limit = variant.options["max_len"]
    kind = sorted(mixer.info.layouts)[0]
    with pytest.raises(ZooError, match=f"(?s){limit + 3}.*{limit}|{limit}.*{limit + 3}"):
        mixer(variant.x(limit + 3), layout_of(kind, limit + 3))


@every
def test_each_parameter_is_in_one_group(variant: Variant) -> None:
    mixer = variant.build()
    groups = split_param_groups(mixer)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in mixer.parameters())


@every
def test_the_dense_path_compiles_without_graph_breaks(variant: Variant) -> None:
    mixer = variant.build()
    layout = layout_of(sorted(mixer.info.layouts)[0])
    x = variant.x()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: mixer(x, layout)[0], fullgraph=True, backend="eager")  # needs no compiler
    with torch.no_grad():
        close(compiled(x), mixer(x, layout)[0], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_bfloat16_stays_finite_at_sixteen_thousand_tokens(name: str) -> None:
    length = 1 << 14
    options = {**TINY[name][0]}
    if "max_len" in options:
        options["max_len"] = length
    variant = Variant(name, 0, options)
    mixer = variant.build(torch.bfloat16)
    with torch.no_grad():
        y, _ = mixer(variant.x(length, 1, torch.bfloat16), layout_of(sorted(mixer.info.layouts)[0], length))
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
