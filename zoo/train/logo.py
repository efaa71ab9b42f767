"""Pictures of in-silico mutagenesis: a sequence logo drawn from glyph outlines, above a heat map of substitutions."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path as Outline

LETTERS = "ACGT"
COLOURS = {"A": "#0b9e43", "C": "#1f5fa8", "G": "#f0a202", "T": "#d7263d"}  # green, blue, orange, red, as is usual
PER_ROW = 80  # positions a row of the picture
COLUMN, MARGIN, ROW = 0.145, 1.75, 2.35  # inches: width of a position, of labels and colour bar, height of a row
Heights = NDArray[np.float64]


def information(scores: Heights) -> Heights:
    """Bits of each letter [L, 4] from log-ratios to the reference [L, 4]: p(letter) times (2 - entropy).

    The softmax of the ratios is the model's law of the base at that place (Schneider & Stephens 1990, NAR 18:6097).
    """
    known = np.isfinite(scores).all(1, keepdims=True)
    shifted = np.where(known, scores, 0) - np.where(known, scores, 0).max(1, keepdims=True)
    p = np.exp(shifted)
    p /= p.sum(1, keepdims=True)
    entropy = -(p * np.log2(np.clip(p, 1e-300, None))).sum(1, keepdims=True)
    return np.where(known, p * (2 - entropy), 0)


def importance(scores: Heights, reference: bytes) -> Heights:
    """Height of the reference letter alone [L, 4]: minus the mean change of the three substitutions.

    Above 0 where the letter supports the output, below where it works against it.
    """
    out = np.zeros(scores.shape)
    for place, letter in enumerate(reference.decode("latin-1")):
        if letter in LETTERS and np.isfinite(scores[place]).all():
            out[place, LETTERS.index(letter)] = -scores[place].sum() / 3  # the reference's own change is 0
    return out


def plot_mutagenesis(
    picture: Path,
    reference: bytes,
    scores: Heights,
    *,
    first: int = 1,
    kind: Literal["information", "importance"] = "importance",
    title: str = "",
    label: str = "change",
) -> Path:
    """Draw a logo and a heat map of *scores* into *picture* (PNG, SVG or PDF) and return it.

    Args:
        picture: the file; written anew.
        reference: L letters.
        scores: [L, 4] change that A, C, G, T at each position makes, 0 for the reference, NaN where unknown.
        first: number of the first position.
        kind: what the letters' heights mean, see `information` and `importance`.
        title: above the picture.
        label: what a score is, at the colour bar.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    heights = information(scores) if kind == "information" else importance(scores, reference)
    length = len(reference)
    columns = min(length, PER_ROW)
    rows = -(-length // PER_ROW)
    width = max(COLUMN * columns + MARGIN, 4.5)
    figure = Figure(figsize=(width, ROW * rows + (0.5 if title else 0.2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * rows, 1, height_ratios=[1.45, 1.0] * rows)
    low, high = _limits(heights, kind)
    known = np.abs(scores[np.isfinite(scores)])
    top = float(np.quantile(known[known > 0], 0.99)) if (known > 0).any() else 1.0
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="#d9d9d9")  # grey: no base of which anything is known
    axes: list[Any] = []
    image = None
    for row in range(rows):
        part = slice(row * PER_ROW, min((row + 1) * PER_ROW, length))
        logo = figure.add_subplot(grid[2 * row])
        draw_logo(logo, heights[part])
        logo.set(xlim=(-0.5, columns - 0.5), ylim=(low, high), ylabel="bits" if kind == "information" else "importance")
        logo.spines[["top", "right", "bottom"]].set_visible(False)
        logo.set_xticks([])
        logo.tick_params(labelsize=7)
        logo.yaxis.label.set_fontsize(8)
        heat = figure.add_subplot(grid[2 * row + 1])
        image = heat.imshow(
            np.ma.masked_invalid(scores[part].T),
            cmap=colours,
            norm=Normalize(-top, top),
            aspect="auto",
            interpolation="nearest",
        )
        _finish_heat(heat, reference[part], first + part.start, columns)
        axes += [logo, heat]
    assert image is not None
    bar = figure.colorbar(image, ax=axes, fraction=min(0.35 / width, 0.1), pad=0.01, aspect=28 * rows, extend="both")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=150, format=picture.suffix.lstrip(".") or "png")
    return picture


def _limits(heights: Heights, kind: str) -> tuple[float, float]:
    if kind == "information":
        return 0.0, max(float(heights.sum(1).max()) * 1.05, 0.1)
    up, down = float(heights.clip(min=0).sum(1).max()), float(heights.clip(max=0).sum(1).min())
    span = max(up - down, 1e-9)
    return down - 0.03 * span, up + 0.03 * span


def _finish_heat(axes: Axes, reference: bytes, first: int, columns: int) -> None:
    """Letters at the side, positions below, a dot in each cell of the reference."""
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_yticks(range(4), list(LETTERS), fontsize=8, fontweight="bold")
    for tick, letter in zip(axes.get_yticklabels(), LETTERS, strict=True):
        tick.set_color(COLOURS[letter])
    places = [i for i in range(len(reference)) if (first + i) % 10 == 0 or (i == 0 and 3 < 10 - first % 10 < 10)]
    axes.set_xticks(places, [f"{first + i:,}" for i in places], fontsize=7)
    axes.tick_params(length=2, pad=1.5)
    axes.spines[:].set_visible(False)
    text = reference.decode("latin-1")
    known = [i for i, letter in enumerate(text) if letter in LETTERS]
    axes.scatter(known, [LETTERS.index(text[i]) for i in known], s=5, color="#303030", linewidths=0)


def draw_logo(axes: Axes, heights: Heights) -> None:
    """Letters of *heights* [L, 4] stacked at x = 0 to L - 1, the largest outermost; upside down below the axis."""
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import Affine2D

    shapes: dict[str, list[Outline]] = {letter: [] for letter in LETTERS}
    faded: dict[str, list[Outline]] = {letter: [] for letter in LETTERS}
    for place, column in enumerate(heights):
        up = down = 0.0
        for index in np.argsort(np.abs(column), kind="stable"):
            height, letter = float(column[index]), LETTERS[index]
            if height == 0:
                continue
            base = up if height > 0 else down
            move = Affine2D().scale(0.94, height).translate(place - 0.47, base)
            (shapes if height > 0 else faded)[letter].append(move.transform_path(outline(letter)))
            up, down = (up + height, down) if height > 0 else (up, down + height)
    for group, alpha in ((shapes, 1.0), (faded, 0.55)):
        for letter, paths in group.items():
            if paths:
                axes.add_collection(PathCollection(paths, facecolors=COLOURS[letter], edgecolors="none", alpha=alpha))
    axes.plot([-0.5, len(heights) - 0.5], [0, 0], color="#404040", linewidth=0.6)


@cache
def outline(letter: str) -> Outline:
    """The glyph as a path that fills the unit square."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), letter, size=100, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, 1 / box.height).transform_path(path)
