"""Training-free token reduction: budgets hold exactly, order is kept, and impossible wishes are refused."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.nn.globalcom2 import compress
from zoo.nn.token_reduction import (
    TokenReducer,
    TokenReducerConfig,
    best_resolution,
    hired_mask,
    hired_pack,
    pool_tokens,
)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 1.0])
def test_a_single_view_keeps_the_best_tokens_in_reading_order(rate: float) -> None:
    features = torch.arange(16.0).reshape(1, 16, 1).expand(2, -1, 3)
    scores = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    reducer = TokenReducer(TokenReducerConfig(rate=rate))
    kept = reducer.single(features, scores)[..., 0].long()
    assert kept.shape == (2, int(16 * rate)) == (2, reducer.budget(1, 16))
    for row, score in zip(kept, scores, strict=True):
        assert row.tolist() == sorted(row.tolist())
        assert set(row.tolist()) == set(score.argsort(descending=True)[: len(row)].tolist())


def test_the_mask_never_exceeds_the_budget() -> None:
    generator = torch.Generator().manual_seed(1)
    for rate in (0.1, 0.33, 0.7):
        top, bottom = torch.rand(5, 36, generator=generator), torch.rand(5, 36, generator=generator)
        mask = hired_mask(top, bottom, (2, 2), rate, 0.5)
        assert int(mask[0].sum()) == min(int(int(180 * rate) * 0.5), 36)
        assert int(180 * rate) - 5 < int(mask.sum()) <= int(180 * rate) or bool(mask.all(1).any())


def test_a_square_picture_loses_nothing_in_packing() -> None:
    features = torch.randn(5, 36, 2)
    mask = hired_mask(torch.rand(5, 36), torch.rand(5, 36), (2, 2), 0.4, 0.5)
    packed = hired_pack(features, mask, (2, 2), (672, 672))
    assert len(packed) == int(mask.sum())
    torch.testing.assert_close(packed[: int(mask[0].sum())], features[0][mask[0]])


def test_the_grid_that_fits_is_chosen() -> None:
    choices = [(336, 672), (672, 336), (672, 672)]
    assert best_resolution((300, 640), choices) == (336, 672)
    assert best_resolution((640, 300), choices) == (672, 336)
    assert best_resolution((600, 600), choices) == (672, 672)


def test_pooling_averages_squares() -> None:
    features = torch.arange(16.0).reshape(1, 16, 1)
    assert pool_tokens(features, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    reducer = TokenReducer(TokenReducerConfig(kind="pool", tokens=1))
    assert reducer.single(features).flatten().tolist() == [7.5]
    assert reducer.budget(3, 16) == 3


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ZooError, match="cannot pool 16 tokens to 9"):
        pool_tokens(torch.zeros(1, 16, 1), 9)
    with pytest.raises(ZooError, match="needs the class token's attention"):
        TokenReducer(TokenReducerConfig()).single(torch.zeros(1, 16, 1))
    with pytest.raises(ValueError, match="rate must lie"):
        TokenReducerConfig(rate=0.0)


def crops() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randn(5, 36, 8, generator=source), torch.randn(5, 36, generator=source)


def test_globalcom2_spreads_the_budget_by_the_thumbnail() -> None:
    features, scores = crops()
    scores[0, :3] = 40.0  # the first crop holds what the thumbnail looks at
    found = compress(features, scores, torch.zeros(8), (672, 672), (2, 2), 0.25)
    assert len(found.thumbnail) == 9
    assert torch.equal(found.thumbnail[:3].sort().values, torch.arange(3))
    assert int(found.share.argmax()) == 0
    assert float(found.share.mean()) == pytest.approx(0.25, abs=1e-6)
    assert found.valid.tolist() == [36] * 4
    assert [len(kept) for kept in found.kept] == [int(36 * float(share)) for share in found.share]
    assert len(found.crop_tokens) == sum(len(kept) for kept in found.kept) + 12  # a newline after every row
    assert len(compress(features, scores, torch.zeros(8), (672, 500), (2, 2), 0.25).kept[0]) < len(found.kept[0])


def test_one_reducer_serves_both_rules_on_crops() -> None:
    features, scores = crops()
    attention = scores.softmax(-1)
    hired = TokenReducer(TokenReducerConfig(kind="hired", rate=0.2))
    assert len(hired.picture(features, attention, attention, (672, 672), (2, 2))) <= hired.budget(5, 36)
    ours = TokenReducer(TokenReducerConfig(kind="globalcom2", rate=0.25))
    tokens = ours.picture(features, None, scores, (672, 672), (2, 2), torch.zeros(8))
    assert torch.equal(tokens, compress(features, scores, torch.zeros(8), (672, 672), (2, 2), 0.25).tokens)
    single = ours.single(features, scores)
    assert torch.equal(single[0], features[0][scores[0].topk(9).indices])
    with pytest.raises(ZooError, match="newline token"):
        ours.picture(features, None, scores, (672, 672), (2, 2))
    with pytest.raises(ZooError, match="early layer too"):
        hired.picture(features, None, attention, (672, 672), (2, 2))
    with pytest.raises(ZooError, match="no budget to spread"):
        TokenReducer(TokenReducerConfig(kind="pool", tokens=9)).picture(features, None, scores, (672, 672), (2, 2))
