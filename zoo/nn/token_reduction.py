"""Visual tokens without training: keep those that the vision transformer itself attends to, or average neighbours.

HiRED (Arif et al. 2024, arXiv:2408.10945) and the pooling of M3 (Cai et al. 2024, arXiv:2405.17430). HiRED reads
pictures as LLaVA-NeXT does: a thumbnail of the whole, then a grid of crops, each of n tokens. Quirks of the official
code that its numbers depend on are named where they are kept.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import config
from zoo.errors import ZooError


@config
class TokenReducerConfig:
    """How many visual tokens stay.

    Attributes:
        kind: `hired`, `globalcom2` (see `zoo.nn.globalcom2`) or `pool`.
        rate: `hired` and `globalcom2`: share of all tokens that may stay.
        alpha: `hired`: the thumbnail's share of the budget.
        temperature: `globalcom2`: of the law that spreads the crops' budget.
        tokens: `pool`: tokens of a picture, a square number whose side divides the picture's.
    """

    kind: Literal["hired", "globalcom2", "pool"] = "hired"
    rate: float = 0.2
    alpha: float = 0.5
    temperature: float = 10.0
    tokens: int = 144

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"rate must lie in (0, 1] and alpha in [0, 1], got {self.rate} and {self.alpha}")


class TokenReducer:
    """One verb for every rule: features -> fewer tokens. Holds no weights."""

    def __init__(self, config: TokenReducerConfig) -> None:
        self.config = config

    def budget(self, partitions: int, n: int) -> int:
        """The most tokens that stay of *partitions* views of *n* tokens."""
        if self.config.kind == "pool":
            return partitions * self.config.tokens
        return int(partitions * n * self.config.rate)

    def single(self, features: Tensor, cls_attention: Tensor | None = None) -> Tensor:
        """One view a picture (LLaVA-1.5): [B, n, D] -> [B, m, D] in reading order.

        Args:
            cls_attention: [B, n] attention that the class token pays each patch (`globalcom2`: its logits, and tokens
                stay in their order, best first); not needed for `pool`.

        Raises:
            ZooError: the attention is missing or has another shape.
        """
        if self.config.kind == "pool":
            return pool_tokens(features, self.config.tokens)
        if cls_attention is None or cls_attention.shape != features.shape[:2]:
            raise ZooError(f"{self.config.kind} needs the class token's attention {list(features.shape[:2])}")
        count = int(features.shape[1] * self.config.rate)
        kept = cls_attention.topk(count, dim=-1).indices
        if self.config.kind == "hired":
            kept = kept.sort(dim=-1).values
        return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))

    def picture(
        self,
        features: Tensor,
        top: Tensor | None,
        bottom: Tensor,
        size: tuple[int, int],
        grid: tuple[int, int],
        newline: Tensor | None = None,
    ) -> Tensor:
        """One picture as LLaVA-NeXT reads it: [1 + crops, n, D], the thumbnail first, -> [m, D].

        Args:
            top, bottom: [1 + crops, n] class attention of an early and of a late layer; `globalcom2` reads the late
                one's logits alone.
            size: height and width of the picture in pixels.
            grid: rows and columns of the crops.
            newline: [D] token that ends a row, for `globalcom2`.

        Raises:
            ZooError: `pool`, which knows no crops, or a missing argument.
        """
        if self.config.kind == "globalcom2":
            if newline is None:
                raise ZooError("globalcom2 ends each row of crops by a newline token: give it")
            from zoo.nn.globalcom2 import compress

            return compress(features, bottom, newline, size, grid, self.config.rate, self.config.temperature).tokens
        if self.config.kind == "pool":
            raise ZooError("pooling makes as many tokens of every view: it has no budget to spread over crops")
        if top is None:
            raise ZooError("hired needs the class token's attention in an early layer too")
        mask = hired_mask(top, bottom, grid, self.config.rate, self.config.alpha)
        return hired_pack(features, mask, grid, size)


def pool_tokens(features: Tensor, tokens: int) -> Tensor:
    """[B, n, D] on a square grid -> [B, tokens, D], means of squares.

    Raises:
        ZooError: the sides of the two grids do not divide.
    """
    side, small = round(features.shape[1] ** 0.5), round(tokens**0.5)
    if side**2 != features.shape[1] or small**2 != tokens or not small or side % small:
        raise ZooError(f"cannot pool {features.shape[1]} tokens to {tokens}: both must be squares whose sides divide")
    grid = features.transpose(1, 2).unflatten(-1, (side, side))
    return F.avg_pool2d(grid, side // small).flatten(2).transpose(1, 2)


def cls_attention(query: Tensor, key: Tensor, heads: int, logits: bool = False) -> Tensor:
    """[P, 1 + n, D] queries and keys of a vision layer -> [P, H, n] attention of the class token to the patches.

    With *logits* before the softmax, which counts the class token itself too.
    """
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    weights = q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (weights if logits else weights.softmax(-1))[:, :, 0, 1:]


def reduce_to(features: Tensor, m: int, kind: str, scores: Tensor | None = None) -> Tensor:
    """[B, n, D] -> [B, m, D], exactly *m* tokens of one view a picture; see `TokenReducer.single`.

    Raises:
        ZooError: m is not in 1..n, or pooling has no such grid.
    """
    n = features.shape[1]
    if not 1 <= m <= n:
        raise ZooError(f"there are {n} visual tokens to choose from, asked for {m}")
    # half a token more than m, so that the rate's rounding never loses one
    rate = min(1.0, (m + 0.5) / n)
    config = TokenReducerConfig(kind=kind, rate=rate, tokens=m)  # type: ignore[arg-type]
    return TokenReducer(config).single(features, scores)


# --- LLaVA-NeXT's crops


def best_resolution(size: tuple[int, int], choices: list[tuple[int, int]]) -> tuple[int, int]:
    """The choice that keeps most of a picture's pixels and wastes fewest, both as (a, b) in one order."""

    def fit(choice: tuple[int, int]) -> tuple[int, int]:
        scale = min(choice[0] / size[0], choice[1] / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return used, used - choice[0] * choice[1]

    return max(choices, key=fit)  # the first of equals


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[slice, slice]:
    """The rows and columns of a grid that hold a picture of *size* (height, width) and no padding."""
    height, width = size
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return slice(pad, rows - pad), slice(0, columns)
    pad = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(pad, columns - pad)


# --- HiRED


def hired_mask(top: Tensor, bottom: Tensor, grid: tuple[int, int], rate: float, alpha: float) -> Tensor:
    """[P, n] bool, the tokens that stay of a thumbnail (row 0) and P - 1 = grid[0] · grid[1] crops.

    A crop's budget follows how many of the thumbnail's int(n (1 - alpha)) best tokens lie in its share. The official
    code cuts the row-major thumbnail into equal runs, so shares are strips of rows and no rectangles.

    Args:
        top, bottom: [P, n] class attention of an early and of a late layer, summed over heads.
    """
    views, n = bottom.shape
    total = int(views * n * rate)
    first = min(int(total * alpha), n)
    counts = [first]
    if views > 1:
        marked = torch.zeros(n, device=top.device)
        best = int(n * (1 - alpha))
        marked[top[0].topk(best).indices] = 1
        share = marked.reshape(grid[0], grid[1], -1).sum(-1).flatten() / marked.sum()
        counts += [min(int(budget), n) for budget in ((total - first) * share).tolist()]
    mask = torch.zeros(views, n, dtype=torch.bool, device=bottom.device)
    for view, count in enumerate(counts):
        mask[view, bottom[view].topk(count).indices] = True
    return mask


def hired_pack(features: Tensor, mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Kept tokens [m, D] of a picture: the thumbnail's, then the crops' in reading order of the assembled picture.

    Kept tokens in the padding around the picture of *size* (height, width) are lost, as in the official code. That
    code also swaps the rows and columns of *grid* here, which only square grids survive: its numbers need (columns,
    rows).
    """
    if len(features) == 1:
        return features[0][mask[0]]
    side = round(features.shape[1] ** 0.5)
    tiles = (*grid, side, side)
    rows, columns = unpadded(size, grid[0] * side, grid[1] * side)
    join = lambda t: t.reshape(*tiles, *t.shape[2:]).transpose(1, 2).flatten(0, 1).flatten(1, 2)[rows, columns]
    return torch.cat([features[0][mask[0]], join(features[1:])[join(mask[1:])]])
