"""GlobalCom²: the thumbnail tells how many tokens of each crop stay, and helps to tell which.

Liu et al. 2025, GlobalCom², arXiv:2501.05179, section 3. Scores are the class token's logits (before the softmax) in
the last layer of the vision transformer, averaged over heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.token_reduction import unpadded


@dataclass
class CompressedPicture:
    """What is left of a picture of a thumbnail and crops.

    Attributes:
        thumbnail: indices of the thumbnail's tokens that stay, best first.
        share: [crops] share of each crop's tokens that may stay.
        valid: [crops] tokens of each crop that are no padding.
        guidance: per crop, the thumbnail's scores for those tokens.
        kept: per crop, which of those tokens stay, best first, counted among them.
        crop_tokens: [n, D] tokens of the crops in reading order, `newline` after each row of the grid.
        tokens: [n + m, D] the thumbnail's tokens, then the crops'.
    """

    thumbnail: Tensor
    share: Tensor
    valid: Tensor
    guidance: list[Tensor]
    kept: list[Tensor]
    crop_tokens: Tensor
    tokens: Tensor


def crop_shares(scores: Tensor, grid: tuple[int, int], ratio: float, temperature: float = 10.0) -> Tensor:
    """[rows · columns] share of tokens that each crop keeps, from the thumbnail's *scores* [n]; float64."""
    side = int(len(scores) ** 0.5)
    rows, columns = grid
    place = torch.arange(len(scores), device=scores.device)
    row = (place // side // max(side // rows, 1)).clamp_max(rows - 1)
    column = (place % side // max(side // columns, 1)).clamp_max(columns - 1)
    total = torch.zeros(rows * columns, dtype=torch.float64, device=scores.device)
    total.index_add_(0, row * columns + column, scores.double())
    weight = ((total - total.max()) / temperature).exp()
    law = weight / (weight.sum() + 1e-8)
    return (ratio * (1 + law - law.mean())).clamp_max(1.0)


def compress(
    features: Tensor,
    scores: Tensor,
    newline: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    ratio: float = 0.25,
    temperature: float = 10.0,
) -> CompressedPicture:
    """Reduce one picture.

    The official code numbers the kept tokens of a crop among those that are no padding, but puts them at those numbers
    of the whole crop: where the top or the left of a crop is padding they move there, and their order stays.

    Args:
        features: [1 + crops, n, D] projected tokens, the thumbnail's first.
        scores: [1 + crops, n].
        newline: [D] token that ends a row.
        size: height and width of the picture in pixels.
        grid: rows and columns of the crops.
    """
    side = int(features.shape[1] ** 0.5)
    height, width = grid[0] * side, grid[1] * side
    rows, columns = unpadded(size, height, width)
    inside = torch.zeros(height, width, dtype=torch.bool, device=features.device)
    inside[rows, columns] = True
    tiles = inside.reshape(grid[0], side, grid[1], side).transpose(1, 2)  # [rows, columns, side, side]
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    guide = torch.zeros(height, width, dtype=scores.dtype, device=scores.device)
    guide[rows, columns] = F.interpolate(scores[0].reshape(1, 1, side, side), size=shape, mode="bilinear")[0, 0]
    guide_tiles = guide.reshape(grid[0], side, grid[1], side).transpose(1, 2).flatten(0, 1).flatten(1)
    masks = tiles.flatten(0, 1).flatten(1)  # [crops, n]

    share = crop_shares(scores[0], grid, ratio, temperature)
    thumbnail = scores[0].argsort(descending=True)[: int(features.shape[1] * ratio)]
    guidance, kept = [], []
    placed = torch.zeros(len(masks), features.shape[1], features.shape[2], dtype=features.dtype, device=features.device)
    stays = torch.zeros_like(masks)
    for i, mask in enumerate(masks):
        own, theirs = scores[1 + i][mask], guide_tiles[i][mask]
        score = F.normalize(own, dim=0) + F.normalize(theirs, dim=0)
        best = score.topk(int(int(mask.sum()) * float(share[i]))).indices
        placed[i, best] = features[1 + i][mask][best]
        stays[i, best] = True
        guidance.append(theirs)
        kept.append(best)
    join = lambda t: t.unflatten(0, grid).unflatten(2, (side, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    lines = torch.cat([join(placed), newline.to(features.dtype).expand(height, 1, -1)], 1)
    marks = torch.cat([join(stays), torch.ones(height, 1, dtype=torch.bool, device=stays.device)], 1)
    crops = lines[marks]
    return CompressedPicture(
        thumbnail, share, masks.sum(1), guidance, kept, crops, torch.cat([features[0][thumbnail], crops])
    )
