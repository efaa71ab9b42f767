"""Saturation mutagenesis: numbers against the model called by hand, the logo's letters against their meaning."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.hub.artifact import Artifact
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn.heads import HeadConfig
from zoo.tokenizers import build
from zoo.train.logo import importance, information, outline, plot_mutagenesis
from zoo.train.mutagenesis import Mutagen, log_odds

TEXT = b"ACGTTGCANGGATTACA"


def hyena(head: HeadConfig, **outputs: object) -> Artifact:
    torch.manual_seed(1)
    model = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=66, head=head)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.dim() > 1 else None
    return Artifact(model, build({"name": "char"}), Path("here"), {"outputs": outputs})


def substituted(place: int, letter: str) -> str:
    text = TEXT.decode()
    return text[:place] + letter + text[place + 1 :]


def test_a_classifier_by_hand() -> None:
    """Log-odds and probability of the class, whole sequence, each substitution; N is left open."""
    found = hyena(HeadConfig(kind="sequence", num_outputs=3), task_kind="multiclass", classes=["a", "b", "c"])
    result = Mutagen(found, "b")("s", TEXT)

    def probability(text: str) -> float:
        ids = torch.from_numpy(found.tokenizer.encode(text))[None]
        return float(found.model(ids).detach()[0].double().softmax(-1)[1])

    whole = probability(TEXT.decode())
    assert list(result.changes) == ["logit", "probability"]
    assert (result.target, result.reference) == ("b", TEXT)
    for i, letter in enumerate(TEXT.decode()):
        for j, other in enumerate("ACGT"):
            change = result.changes["probability"][i, j]
            if letter == "N":
                assert math.isnan(change)
                continue
            p = probability(substituted(i, other))
            assert change == pytest.approx(p - whole, abs=1e-5)
            odds = math.log(p / (1 - p)) - math.log(whole / (1 - whole))
            assert result.changes["logit"][i, j] == pytest.approx(odds, abs=1e-3)
    predicted = int(found.model(torch.from_numpy(found.tokenizer.encode(TEXT))[None])[0].argmax())
    assert Mutagen(found)("s", TEXT).target == "abc"[predicted]


def test_regression_and_both_strands() -> None:
    found = hyena(HeadConfig(kind="sequence", num_outputs=1), task_kind="regression", classes=["activity"])
    results = {strand: Mutagen(found, strand=strand)("s", TEXT).changes["value"] for strand in ("+", "-", "both")}
    assert np.allclose(results["both"], (results["+"] + results["-"]) / 2, atol=1e-5, equal_nan=True)
    table = bytes.maketrans(b"ACGT", b"TGCA")
    back = Mutagen(found)("s", TEXT.translate(table)[::-1]).changes["value"]
    assert np.allclose(results["-"], back[::-1, ::-1], atol=1e-5, equal_nan=True)


def test_the_law_of_a_causal_model() -> None:
    """Softmax over the four sequences' log-likelihoods, in a region of a longer sequence."""
    found = hyena(HeadConfig())
    result = Mutagen(found)("s", TEXT, 2, 6)
    assert (result.start, result.reference, result.measure, result.is_law) == (2, TEXT[2:6], "llr", True)
    heights = information(result.changes["llr"])
    for i in range(4):
        totals = []
        for letter in "ACGT":
            ids = torch.from_numpy(found.tokenizer.encode(substituted(2 + i, letter)))[None]
            law = found.model(ids).detach()[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            counted = [j for j, token in enumerate(ids[0, 1:].tolist()) if 7 <= token <= 10]
            totals.append(float(law[counted].sum()))
        p = np.exp(np.array(totals) - max(totals))
        p /= p.sum()
        assert np.allclose(heights[i], p * (2 + (p * np.log2(p)).sum()), atol=1e-3)


def test_a_masked_model_reads_each_position_once() -> None:
    tokenizer = build({"name": "char"})
    model = DNABERT2(DNABERT2Config(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=12)).eval()
    rows: list[int] = []
    model.backbone.register_forward_hook(lambda *_: rows.append(1))
    result = Mutagen(Artifact(model, tokenizer, Path("here"), {}), batch_size=1)("s", TEXT)
    assert result.measure == "masked_marginal"
    assert len(rows) == len(TEXT) - 1  # without N; the three substitutions share their input


def test_log_odds_of_two_classes_are_the_difference() -> None:
    logits = torch.randn(5, 2)
    assert torch.allclose(log_odds(logits)[:, 1], logits[:, 1] - logits[:, 0], atol=1e-6)
    p = torch.randn(5, 4).softmax(-1)
    assert torch.allclose(log_odds(p.log()), (p / (1 - p)).log(), atol=1e-5)


def test_heights_of_letters() -> None:
    nothing = np.zeros((1, 4))
    assert np.allclose(information(nothing), 0)  # four equal letters tell nothing
    sure = np.array([[0.0, -50, -50, -50]])
    assert np.allclose(information(sure), [[2, 0, 0, 0]])  # one letter alone tells two bits
    assert np.allclose(information(np.array([[0.0, 0, -50, -50]])), [[0.5, 0.5, 0, 0]])
    assert np.allclose(information(np.full((1, 4), np.nan)), 0)
    scores = np.array([[0.0, -3, -3, -6], [1, 1, 0, 1], [np.nan] * 4])
    assert np.allclose(importance(scores, b"AGN"), [[4, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 0]])


def test_the_picture_shows_the_letters(tmp_path: Path) -> None:
    """Each letter fills its cell from the axis to its height, in its colour."""
    from matplotlib.image import imread

    for letter in "ACGT":
        box = outline(letter).get_extents()
        assert np.allclose([box.x0, box.y0, box.x1, box.y1], [0, 0, 1, 1], atol=1e-6)
    scores = np.where(np.eye(4, dtype=bool), 0.0, -4.0)
    picture = plot_mutagenesis(tmp_path / "p.png", b"ACGT", scores, title="t", kind="information")
    pixels = imread(picture)[..., :3]
    for colour in ((0x0B, 0x9E, 0x43), (0x1F, 0x5F, 0xA8), (0xF0, 0xA2, 0x02), (0xD7, 0x26, 0x3D)):
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.01).sum() > 200
    long = plot_mutagenesis(tmp_path / "long.svg", b"ACGT" * 50, np.tile(scores, (50, 1)), first=1001)
    assert "<!-- 1,010 -->" in long.read_text()  # positions count from the first
    plot_mutagenesis(tmp_path / "flat.png", b"NN", np.full((2, 4), np.nan))  # nothing known is still a picture
