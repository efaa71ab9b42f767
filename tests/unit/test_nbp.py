"""NBP: who sees whom, block orders, and decoding with a cache against plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.config import from_dict
from zoo.errors import ConfigError, ZooError
from zoo.generate.next_block import generate_blocks
from zoo.models.nbp import NBP, NBPConfig, block_order
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig


def build(**changes: Any) -> NBP:
    torch.manual_seed(3)
    fields: dict[str, Any] = {
        "d_model": 16, "n_layer": 2, "options": {"heads": 2, "bias": True}, "mlp": MLPConfig(kind="gelu", width=32),
        "video_vocab": 24, "grid": (4, 2, 4), "block": 4, "max_len": 64, **changes,
    }  # fmt: skip
    return NBP(NBPConfig(**fields)).eval()


HYBRID: dict[str, Any] = {"hybrid": True, "cond_vocab": 5, "cond_tokens": 2}


def codes(model: NBP, batch: int = 2) -> Tensor:
    return torch.randint(24, (batch, *model.config.grid), generator=torch.Generator().manual_seed(1))


def cond(batch: int = 2) -> Tensor:
    return torch.tensor([[1, 4], [0, 2]])[:batch]


@pytest.mark.parametrize("changes", [{}, HYBRID, {"block": 1}, {"block": 1, "hybrid": True}])
def test_a_logit_never_depends_on_the_block_it_predicts(changes: dict[str, Any]) -> None:
    model = build(**changes)
    clip, given = codes(model), cond() if model.config.cond_tokens else None
    base = model.loss(clip, given)["logits"]
    _, targets = model.arrange(clip, given)
    changed = clip.clone()
    changed.view(2, -1)[:, 12] = (changed.view(2, -1)[:, 12] + 1) % 24
    after = model.loss(changed, given)["logits"]
    moved = (base != after).any(-1).any(0)
    target_of_change = 12 - (model.order.numel() - targets.shape[1])
    block = model.config.block
    first = target_of_change // block * block
    assert not moved[: first + block].any(), "nothing up to the end of its own block"
    assert moved[first + block :].any()


def test_the_mask_of_the_hybrid_form() -> None:
    model = build(**HYBRID)
    length = model.arrange(codes(model), cond())[0].shape[1]
    seen = Layout("block_causal", block=model.block_index(length)).dense(length)[0]
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    expected[:, :2] = True  # the condition
    for start in range(2 + 4, length, 4):
        expected[start : start + 4, start : start + 4] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("changes", [{}, HYBRID, {"shape": (1, 2, 2)}, {"shape": (2, 1, 2)}, {"block": 1}])
def test_decoding_with_a_cache_is_the_training_pass(changes: dict[str, Any]) -> None:
    """Greedy tokens are the likeliest ones of a pass without a cache over the finished clip."""
    model = build(**changes)
    given = cond() if model.config.cond_tokens else None
    frames = None if model.config.hybrid else codes(model)[:, :2]
    made = generate_blocks(model, given, frames, temperature=0)
    logits = model.loss(made.codes, given)["logits"].clone()
    logits[..., : model.config.first_video] = -torch.inf
    new = made.ids.shape[1]
    assert torch.equal(logits[:, -new:].argmax(-1), made.ids)
    if frames is not None:
        assert torch.equal(made.codes[:, :2], frames)
    c = model.config
    assert made.steps == (c.block + 32 // c.block - 1 if c.hybrid else 16 // c.block)


def test_guidance_of_one_and_of_nothing() -> None:
    model = build(**HYBRID)
    with torch.no_grad():  # guidance has something to move only where the condition matters
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    plain = generate_blocks(model, cond(), temperature=0)
    guided = generate_blocks(model, cond(), temperature=0, guidance=0.0)
    free = generate_blocks(model, None, temperature=0, batch=2)
    assert torch.equal(guided.codes, free.codes), "scale 0 is the model without the condition"
    assert not torch.equal(plain.codes, free.codes)
    assert generate_blocks(model, cond(), temperature=0, guidance=3.0).codes.shape == plain.codes.shape


def test_sampling_repeats_with_its_seed_and_stays_in_the_video_range() -> None:
    model = build(**HYBRID)
    draws = [
        generate_blocks(model, cond(), top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(7)).ids
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert int(draws[0].min()) >= model.config.first_video


def test_block_orders_are_permutations_of_whole_boxes() -> None:
    order = block_order((2, 4, 4), (2, 2, 2))
    assert sorted(order.tolist()) == list(range(32))
    t, h, w = order[:8] // 16, order[:8] % 16 // 4, order[:8] % 4
    assert (t.unique().tolist(), h.unique().tolist(), w.unique().tolist()) == ([0, 1], [0, 1], [0, 1])
    assert torch.equal(block_order((2, 4, 4), (1, 1, 4)), torch.arange(32))


def test_dropping_the_condition_trains_the_null_condition_path() -> None:
    model = build(**HYBRID, cond_dropout=1.0, embed_dropout=0.0, resid_dropout=0.0)
    clip = codes(model)
    none = model.loss(clip, None)["loss"]
    model.train()
    assert torch.equal(model.loss(clip, cond())["loss"], none)
    model.loss(clip, cond())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block": 5}, "32 tokens of a clip are not whole blocks of 5"),
        ({"shape": [1, 2, 4]}, r"a block of shape \[1, 2, 4\] does not hold 4 tokens"),
        ({"block": 3, "grid": [3, 3, 3], "shape": [1, 1, 3], "max_len": 8}, "over max_len"),
        ({"cond_vocab": 4}, "cond_vocab and cond_tokens go together"),
    ],
)
def test_configs_that_make_no_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_dict(NBPConfig, {"grid": [4, 2, 4], "block": 4, **changes}, "model")


def test_wrong_inputs() -> None:
    model, hybrid = build(), build(**HYBRID)
    with pytest.raises(ZooError, match="this NBP was built for"):
        model.arrange(torch.zeros(1, 2, 2, 2, dtype=torch.long))
    with pytest.raises(ZooError, match="takes no condition"):
        model.arrange(codes(model), cond())
    with pytest.raises(ZooError, match="a condition is 2 ids from 0 to 4"):
        hybrid.arrange(codes(hybrid), cond() + 9)
    with pytest.raises(ZooError, match="continues frames"):
        generate_blocks(model)
    with pytest.raises(ZooError, match="takes no frames"):
        generate_blocks(hybrid, cond(), codes(hybrid)[:, :1])
    with pytest.raises(ZooError, match="guidance needs"):
        generate_blocks(hybrid, None, guidance=2.0)
