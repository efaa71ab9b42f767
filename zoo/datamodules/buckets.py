"""Dataset decomposition: documents cut into pieces of power-of-two lengths, and batches of one length each.

Pouransari et al. 2024, "Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum",
arXiv:2405.13226, §2. Every batch holds whole pieces of single documents, so nothing is packed, padded or masked:
what a long convolution, which cannot forget at a document's border, needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError


def get_binary(
    length: int, min_log2: int, max_log2: int, random: np.random.RandomState | None = None
) -> list[tuple[int, int]]:
    """Cut a document of *length* tokens into pieces of 2^k + 1 tokens, k from min_log2 to max_log2.

    The extra token lets inputs and shifted targets both have 2^k. The largest power that fits is taken each time; with
    *random*, k is drawn while more than 2^(max_log2 + 1) are left, P(k) ∝ 2^(max_log2 - k), which gives every bucket
    the same expected number of tokens. Fewer than 2^min_log2 + 1 tokens at the end are dropped.

    Returns:
        (k, start) of each piece, in order.
    """
    powers = 2.0 ** np.arange(max_log2 + 1 - min_log2)
    pieces, start = [], 0
    while length - start > 1:
        k = (length - start - 1).bit_length() - 1
        if k < min_log2:
            break
        if k > max_log2:
            if random is None:
                k = max_log2
            else:
                k = int(random.choice(np.arange(max_log2, min_log2 - 1, -1), p=powers / powers.sum()))
        pieces.append((k, start))
        start += (1 << k) + 1
    return pieces


def decompose(
    lengths: Sequence[int] | NDArray[np.int64], min_log2: int, max_log2: int, seed: int | None = None
) -> NDArray[np.int64]:
    """Pieces of all documents, [n, 3] of (document, k, start); with *seed*, drawn at random document by document."""
    random = None if seed is None else np.random.RandomState(seed)
    rows = [
        (document, k, start)
        for document, length in enumerate(lengths)
        for k, start in get_binary(int(length), min_log2, max_log2, random)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


class BucketBatchSampler:
    """Batches of pieces of one length, with as many tokens each, short ones likelier at the beginning of each cycle.

    Iterating gives lists of row numbers of `pieces`, for `DataLoader(batch_sampler=...)`. The order is a pure function
    of (seed, epoch), the same buckets come on every rank at the same step, and `state_dict` continues in mid-epoch.

    Args:
        lengths: tokens of each document.
        min_log2, max_log2: powers of two of the shortest and longest piece.
        tokens_per_batch: tokens of a batch on each rank; a bucket's batches hold tokens_per_batch / 2^k pieces.
        curriculum: odds of a batch from each bucket, short to long: `uniform`, `pow2` (the paper's 2^(max_log2 - k)),
            or numbers. They weigh the batches a bucket has left.
        cycles: how often an epoch goes through the curriculum, each with its share of every bucket (the paper's 8).
        randomize: cut long documents at random instead of greedily.
        seed: of the cuts and the order.
        rank, world: this process and how many share each epoch.

    Raises:
        ZooError: no bucket fills a batch, the longest piece does not fit into one, or odds of the wrong number.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        *,
        min_log2: int = 8,
        max_log2: int = 13,
        tokens_per_batch: int = 1 << 15,
        curriculum: Literal["uniform", "pow2"] | Sequence[float] = "pow2",
        cycles: int = 8,
        randomize: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if tokens_per_batch < 1 << max_log2:
            raise ZooError(
                f"tokens_per_batch {tokens_per_batch} is less than the longest piece, 2^{max_log2} = {1 << max_log2}"
            )
        self.min_log2, self.max_log2, self.tokens_per_batch = min_log2, max_log2, tokens_per_batch
        self.cycles, self.seed, self.rank, self.world = cycles, seed, rank, world
        self.pieces = decompose(lengths, min_log2, max_log2, seed if randomize else None)
        buckets = range(min_log2, max_log2 + 1)
        if curriculum == "uniform":
            odds = [1.0] * len(buckets)
        elif curriculum == "pow2":
            odds = [2.0 ** (max_log2 - k) for k in buckets]
        else:
            odds = [float(value) for value in curriculum]
        if len(odds) != len(buckets) or min(odds) < 0 or max(odds) <= 0:
            raise ZooError(f"the curriculum needs {len(buckets)} odds, one for each bucket, got {odds}")
        self.odds = np.array(odds)
        if len(self) == 0:
            raise ZooError(
                f"no bucket from 2^{min_log2} to 2^{max_log2} has the pieces of one batch of {tokens_per_batch} tokens "
                f"on {world} ranks"
            )
        self.epoch = 0
        self.position = 0

    def batch_size(self, k: int) -> int:
        """Pieces of 2^k tokens in a batch on each rank."""
        return self.tokens_per_batch >> k

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank; what does not fill one is left out."""
        return int(self._batches().sum())

    def _batches(self) -> NDArray[np.int64]:
        buckets = np.arange(self.min_log2, self.max_log2 + 1)
        have = np.array([(self.pieces[:, 1] == k).sum() for k in buckets])
        return have // (np.array([self.batch_size(int(k)) for k in buckets]) * self.world)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """This rank's row numbers of each batch of *epoch*."""
        random = np.random.default_rng([self.seed & (2**63 - 1), epoch])
        total = self._batches()
        queues: list[list[NDArray[np.int64]]] = []
        for b, k in enumerate(range(self.min_log2, self.max_log2 + 1)):
            order = random.permutation(np.flatnonzero(self.pieces[:, 1] == k))
            size = self.batch_size(k) * self.world
            queues.append(np.split(order[: total[b] * size], total[b]) if total[b] else [])
        batches, used = [], np.zeros_like(total)
        for cycle in range(self.cycles):
            # each cycle takes its share of every bucket, rounded so that the last one ends with all of them
            due = total * (cycle + 1) // self.cycles - used
            while due.any():
                weight = np.where(due > 0, np.maximum(self.odds, 1e-12) * due, 0)
                b = int(random.choice(len(due), p=weight / weight.sum()))
                batches.append(np.array_split(queues[b][used[b]], self.world)[self.rank])
                used[b] += 1
                due[b] -= 1
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan(self.epoch)
        while self.position < len(plan):
            self.position += 1
            yield plan[self.position - 1].tolist()
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, counted in batches handed out."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "batches": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the last one handed out when *state* was taken.

        Raises:
            ZooError: the state is of another data set, seed or batch.
        """
        if state["seed"] != self.seed or state["batches"] != len(self):
            raise ZooError(
                f"cannot resume: the checkpoint has seed {state['seed']} and {state['batches']} batches an epoch, "
                f"this run {self.seed} and {len(self)}"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
