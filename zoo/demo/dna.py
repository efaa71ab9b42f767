"""Behind the page of a DNA model: predictions, a score for every base, and what each substitution does."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ZooError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from zoo.hub.artifact import Artifact

MOST_SEQUENCES = 200
MOST_MUTATED = 400  # bases of the logo: three passes of the model each
EXACT_MASKED = 256  # bases up to which a masked model takes one pass a token; above, every eighth token at once
LETTERS_SHOWN = 120  # bases up to which the plot has letters below it
COLOURS = {"A": "#0b9e43", "C": "#1f5fa8", "G": "#f0a202", "T": "#d7263d"}


@dataclass(frozen=True)
class Reading:
    """What a model says of some sequences.

    Attributes:
        header, rows: the table of `zoo predict`.
        picture: scores along the first sequence; None for a model that gives one answer a sequence.
        note: one line about the picture.
    """

    header: list[str]
    rows: list[list[str]]
    picture: Image | None
    note: str


class DnaDemo:
    """A model of sequences.

    Attributes:
        kind: `lm`, `sequence` or `token`, as the model's head.
        pairs: the model was trained on pairs of sequences.

    Raises:
        ZooError: no tokenizer, or no head for sequences.
    """

    def __init__(self, artifact: Artifact) -> None:
        head = getattr(artifact.model.config, "head", None)
        if artifact.tokenizer is None or head is None:
            raise ZooError(f"{artifact.path} holds no tokenizer of letters, so there is nothing to paste into its page")
        self.artifact, self.kind = artifact, head.kind
        self.pairs = bool(artifact.recipe.get("data", {}).get("sequence2"))

    def read(self, text: str, file: str | None = None, mates: str = "") -> Reading:
        """Predictions for pasted letters or FASTA, or for a FASTA *file*, and scores along the first sequence.

        Raises:
            ZooError: nothing to read, too many or too long sequences.
        """
        from zoo.cli.predict import predict

        found = sequences(text, file)
        names, given = [name for name, _ in found], [letters for _, letters in found]
        if self.pairs:
            seconds = [letters for _, letters in sequences(mates, None)]
            if len(seconds) != len(given):
                raise ZooError(f"{len(given)} first and {len(seconds)} second sequences: this model reads pairs")
            header, rows = predict(self.artifact, names, list(zip(given, seconds, strict=True)), 32)
            return Reading(header, rows, None, "")
        if self.kind == "lm":
            return self._likelihoods(names, given)
        header, rows = predict(self.artifact, names, given, 32)
        if self.kind == "token":
            picture = plot_classes(names[0], given[0], header, [row for row in rows if row[0] == names[0]])
            return Reading(header, rows, picture, "Probability of each class along the first sequence.")
        return Reading(header, rows, None, "")

    def _likelihoods(self, names: list[str], given: list[bytes]) -> Reading:
        from zoo.train.embed import Reader, score

        reader = Reader(self.artifact)
        longest = max(len(letters) for letters in given)
        every = 0 if reader.causal or longest <= EXACT_MASKED else 8
        found = list(score(reader, zip(names, given, strict=True), mask_every=every))
        kind = "" if reader.causal else "pseudo-"
        header = ["name", "tokens", "bases", f"{kind}log-likelihood", f"{kind}bits per base"]
        rows = []
        for one in found:
            bases = int(one.bases.sum())
            bits = f"{-one.total / bases / math.log(2):.4f}" if bases else ""
            rows.append([one.name, str(len(one.tokens)), str(bases), f"{one.total:.3f}", bits])
        first = found[0]
        surprise = per_base(first.spans, first.tokens, first.bases, len(given[0]))
        how = "given the bases before it" if reader.causal else "given all others"
        note = f"Surprise of each base of the first sequence in bits, {how}; a uniform guess costs 2."
        if every:
            note += " Longer sequences are masked eight tokens apart, which is approximate."
        return Reading(header, rows, plot_bits(names[0], reader.prepare(given[0]), surprise), note)

    def mutate(self, text: str, file: str | None = None) -> tuple[Image, str]:
        """Sequence logo and heat map of all substitutions of the first sequence (of its middle, where it is long).

        Raises:
            ZooError: as `read`; or a model that gives no number for a sequence.
        """
        from PIL import Image as Images

        from zoo.train.logo import plot_mutagenesis
        from zoo.train.mutagenesis import Mutagen, meaning

        name, letters = sequences(text, file)[0]
        start = max(0, (len(letters) - MOST_MUTATED) // 2)
        end = min(len(letters), start + MOST_MUTATED)
        found = Mutagen(self.artifact)(name, letters, start, end)
        what = f"{meaning(found.measure)} of {found.target}" if found.target else meaning(found.measure)
        with tempfile.TemporaryDirectory() as place:
            file_ = plot_mutagenesis(
                Path(place) / "logo.png",
                found.reference,
                found.changes[found.measure],
                first=start + 1,
                kind="information" if found.is_law else "importance",
                title=f"{name}: {what}",
                label=meaning(found.measure),
            )
            picture = Images.open(file_).convert("RGB")
        part = "" if end - start == len(letters) else f", bases {start + 1:,} to {end:,} of {len(letters):,}"
        return picture, f"All {3 * (end - start):,} substitutions of {name}{part}."


def sequences(text: str, file: str | None) -> list[tuple[str, bytes]]:
    """(name, letters) of a FASTA file, of pasted FASTA, or of pasted letters.

    Raises:
        ZooError: nothing there, an empty sequence, or too many of them.
    """
    from zoo.datamodules.fasta import read_fasta

    if file:
        records = list(read_fasta(file))
    elif text.lstrip().startswith(">"):
        with tempfile.TemporaryDirectory() as place:
            pasted = Path(place) / "pasted.fa"
            pasted.write_text(text.lstrip(), encoding="utf-8")
            records = list(read_fasta(pasted))
    else:
        letters = "".join(text.split())
        if not letters:
            raise ZooError("paste a DNA sequence, or drop a FASTA file")
        records = [("sequence", letters.encode("latin-1", "replace"))]
    if len(records) > MOST_SEQUENCES:
        raise ZooError(f"the page reads at most {MOST_SEQUENCES} sequences, not {len(records)}: use `zoo predict`")
    named = [(header.split()[0] if header.split() else f"sequence_{i}", s) for i, (header, s) in enumerate(records, 1)]
    empty = next((name for name, letters in named if not letters), None)
    if empty is not None:
        raise ZooError(f"sequence '{empty}' is empty")
    return named


def per_base(
    spans: NDArray[np.int64], tokens: NDArray[np.float64], bases: NDArray[np.int64], length: int
) -> NDArray[np.float64]:
    """Surprise in bits of each letter [length]; a token's is shared out among its letters, NaN where none is known."""
    out = np.full(length, np.nan)
    for (start, end), value, count in zip(spans, tokens, bases, strict=True):
        if count and end > start:
            out[start:end] = -value / math.log(2) / (end - start)
    return out


def plot_bits(name: str, letters: bytes, bits: NDArray[np.float64]) -> Image:
    """Bars coloured by letter for a short sequence; for a long one the values and their running mean."""
    figure, axes = _figure()
    places = np.arange(1, len(bits) + 1)
    if len(bits) <= LETTERS_SHOWN * 3:
        colours = [COLOURS.get(chr(letter).upper(), "#888888") for letter in letters]
        axes.bar(places, np.nan_to_num(bits), width=1.0, color=colours)
        if len(bits) <= LETTERS_SHOWN:
            axes.set_xticks(places, [chr(letter) for letter in letters], fontsize=7, family="monospace")
        for letter, colour in COLOURS.items():
            axes.bar([0], [0], color=colour, label=letter)
    else:
        window = max(10, len(bits) // 50)
        axes.plot(places, bits, color="#b9c4cf", linewidth=0.5)
        axes.plot(places, running_mean(bits, window), color="#00796b", linewidth=1.4, label=f"mean of {window} bases")
    axes.axhline(2, color="#666666", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0.5, len(bits) + 0.5), ylim=(0, None), ylabel="bits", title=name)
    axes.legend(loc="upper right", fontsize=7, ncols=4, frameon=False)
    return _picture(figure)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the known values within *window* places around each, NaN where there are none."""
    known = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(known, values, 0), ones, "same")
    count = np.convolve(known.astype(float), ones, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def plot_classes(name: str, letters: bytes, header: list[str], rows: list[list[str]]) -> Image:
    """Numbers of each output (columns after `end`, the prediction left out) over the letters they stand for."""
    figure, axes = _figure()
    outputs = [i for i, key in enumerate(header) if key not in ("name", "start", "end", "prediction")]
    first, last = header.index("start"), header.index("end")
    for i in outputs:
        values = np.full(len(letters), np.nan)
        for row in rows:
            values[int(row[first]) : int(row[last])] = float(row[i])
        axes.step(
            np.arange(1, len(letters) + 1), values, where="mid", linewidth=1.2, label=header[i].removeprefix("p_")
        )
    axes.set(xlim=(0.5, len(letters) + 0.5), title=name)
    axes.legend(loc="upper right", fontsize=7, frameon=False)
    return _picture(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    return figure, axes


def _picture(figure: Any) -> Image:
    import io

    from PIL import Image as Images

    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, format="png")
    stream.seek(0)
    return Images.open(stream).convert("RGB")
