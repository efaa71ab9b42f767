"""Dataset decomposition: the cuts, and the batches of one length."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.datamodules.buckets import BucketBatchSampler, decompose, get_binary
from zoo.errors import ZooError


@pytest.mark.parametrize("length", [0, 1, 8, 9, 16, 17, 100, 4097])
def test_pieces_follow_one_another_and_miss_only_the_tail(length: int) -> None:
    pieces = get_binary(length, 3, 6)
    assert [start for _, start in pieces] == np.cumsum([0, *[(1 << k) + 1 for k, _ in pieces]])[:-1].tolist()
    covered = sum((1 << k) + 1 for k, _ in pieces)
    assert 0 <= length - covered < 9
    assert all(3 <= k <= 6 for k, _ in pieces)


def test_random_cuts_give_every_bucket_the_same_tokens() -> None:
    rows = decompose([2_000_000], 3, 6, seed=1)
    tokens = [int((rows[:, 1] == k).sum()) << k for k in range(3, 7)]
    assert max(tokens) / min(tokens) < 1.1
    assert not np.array_equal(rows, decompose([2_000_000], 3, 6, seed=2))


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(5, 900, 300)]


def sampler(**options: object) -> BucketBatchSampler:
    return BucketBatchSampler(LENGTHS, **{"min_log2": 3, "max_log2": 6, "tokens_per_batch": 128, **options})


def test_batches_hold_one_length_and_the_same_tokens() -> None:
    batches = list(sampler())
    seen = np.concatenate(batches)
    assert len(seen) == len(set(seen.tolist()))
    pieces = sampler().pieces
    for batch in batches:
        (k,) = set(pieces[batch, 1].tolist())
        assert len(batch) << k == 128
    assert len(batches) == len(sampler())


def test_ranks_share_the_bucket_of_each_step() -> None:
    ranks = [sampler(rank=r, world=2) for r in (0, 1)]
    plans = [rank.plan(0) for rank in ranks]
    pieces = ranks[0].pieces
    for left, right in zip(*plans, strict=True):
        assert set(pieces[left, 1]) == set(pieces[right, 1])
        assert not set(left.tolist()) & set(right.tolist())


def test_short_pieces_come_first_in_each_cycle() -> None:
    def mean_place(curriculum: str, k: int) -> float:
        run = sampler(curriculum=curriculum, cycles=1)
        places = [i for i, batch in enumerate(run) if run.pieces[batch[0], 1] == k]
        return float(np.mean(places)) / len(run)

    assert mean_place("pow2", 3) < mean_place("uniform", 3) - 0.05
    assert mean_place("pow2", 6) > mean_place("uniform", 6) + 0.05


def test_every_cycle_has_its_share() -> None:
    run = sampler(cycles=4)
    kinds = [int(run.pieces[batch[0], 1]) for batch in run]
    total = {k: kinds.count(k) for k in range(3, 7)}
    quarter = [sum(total[k] * (c + 1) // 4 - total[k] * c // 4 for k in total) for c in range(4)]
    first = kinds[: quarter[0]]
    assert {k: first.count(k) for k in total} == {k: n // 4 for k, n in total.items()}


def test_resuming_continues_with_the_next_batch() -> None:
    whole = sampler()
    first, second = list(whole), list(whole)
    assert first != second
    run = sampler()
    iterator = iter(run)
    begun = [next(iterator) for _ in range(5)]
    state = run.state_dict()
    other = sampler()
    other.load_state_dict(state)
    assert begun + list(other) == first
    assert list(other) == second
    with pytest.raises(ZooError, match="resume"):
        sampler(seed=3).load_state_dict(state)


def test_what_does_not_fit() -> None:
    with pytest.raises(ZooError, match="longest piece"):
        sampler(tokens_per_batch=32)
    with pytest.raises(ZooError, match="no bucket"):
        BucketBatchSampler([4, 5], min_log2=3, max_log2=4, tokens_per_batch=64)
    with pytest.raises(ZooError, match="4 odds"):
        sampler(curriculum=[1, 2])
