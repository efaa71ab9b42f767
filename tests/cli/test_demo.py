"""What stands behind the pages of `zoo demo`, without a browser and without Gradio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo.hub.artifact as artifact
from zoo.demo.clips import ClipGeneratorDemo, ClipTokenizerDemo, read_clip
from zoo.demo.dna import DnaDemo, per_base, plot_classes, running_mean, sequences
from zoo.demo.page import guarded, open_demo
from zoo.demo.pictures import PictureGeneratorDemo, PictureTokenizerDemo, listed, nearest_up
from zoo.demo.questions import QuestionDemo
from zoo.errors import ZooError

Zoo = Callable[..., tuple[int, str, str]]


def opened(place: Path, **more: str) -> Any:
    return open_demo(artifact.load(place), **more)


def gif(file: Path, frames: int, side: int = 16) -> Path:
    draw = np.random.default_rng(0)
    first, *rest = (Image.fromarray(draw.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(frames))
    first.save(file, save_all=True, append_images=rest, duration=100)
    return file


# --- DNA


def test_pasted_letters_pasted_fasta_and_a_file(tmp_path: Path) -> None:
    assert sequences(" ACGT\nAC ", None) == [("sequence", b"ACGTAC")]
    assert sequences(">a x\nAC\nGT\n>b\nTT", None) == [("a", b"ACGT"), ("b", b"TT")]
    file = tmp_path / "x.fa"
    file.write_text(">c\nGG\n")
    assert sequences("ignored", str(file)) == [("c", b"GG")]
    for text, complaint in (("  ", "paste a DNA sequence"), (">a\n>b\nAC", "sequence 'a' is empty"),
                            (">x\nA\n" * 201, "at most 200 sequences, not 201")):  # fmt: skip
        with pytest.raises(ZooError, match=complaint):
            sequences(text, None)


@pytest.mark.parametrize("name", ["letters", "kmers", "masked"])
def test_the_bits_of_a_language_model_add_up_to_its_likelihood(models: dict[str, Path], name: str) -> None:
    from zoo.train.embed import Reader, score

    found = artifact.load(models[name])
    text = "ACGTTGCAGATTACAGATTACA"
    reading = DnaDemo(found).read(f">one\n{text}\n>two\nACGTACGT")
    assert [row[0] for row in reading.rows] == ["one", "two"]
    assert reading.picture is not None
    assert reading.picture.width > 500
    assert ("pseudo" in reading.header[3]) == (name == "masked")
    (one,) = score(Reader(found), [("one", text)])
    bits = per_base(one.spans, one.tokens, one.bases, len(text))
    assert np.nansum(bits) == pytest.approx(-one.total / np.log(2))
    assert float(reading.rows[0][3]) == pytest.approx(one.total, abs=1e-3)


def test_a_long_sequence_is_drawn_with_its_running_mean(models: dict[str, Path]) -> None:
    reading = opened(models["kmers"]).read("ACGTTGCAGA" * 60)
    assert reading.picture is not None
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert running_mean(values, 3).tolist() == [1.0, 2.0, 4.0, 4.0]


def test_a_classifier_and_its_logo(models: dict[str, Path]) -> None:
    demo = opened(models["classes"])
    reading = demo.read("ACGTACGTAA")
    assert reading.header == ["name", "prediction", "p_no", "p_yes"]
    assert sum(map(float, reading.rows[0][2:])) == pytest.approx(1, abs=1e-3)
    assert reading.picture is None
    picture, note = demo.mutate("ACGTACGTAA")
    assert note == "All 30 substitutions of sequence."
    assert picture.width > 400


def test_the_logo_of_a_long_sequence_is_that_of_its_middle(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.demo.dna.MOST_MUTATED", 8)
    _, note = opened(models["letters"]).mutate("ACGTACGTAC" * 2)
    assert note == "All 24 substitutions of sequence, bases 7 to 14 of 20."


def test_classes_along_a_sequence_are_drawn() -> None:
    header = ["name", "start", "end", "prediction", "p_gene", "p_rest"]
    rows = [["a", "0", "3", "gene", "0.9", "0.1"], ["a", "3", "6", "rest", "0.2", "0.8"]]
    assert plot_classes("a", b"ACGTAC", header, rows).width > 500


def test_too_long_is_the_models_own_sentence(models: dict[str, Path]) -> None:
    run = guarded(opened(models["letters"]).read, 3)
    assert run("ACGT" * 100)[:3] == [None] * 3
    assert "the model takes at most 130" in run("ACGT" * 100)[3]
    assert "&lt;script&gt;" in run("><script>\n")[3], "names come from strangers"


# --- pictures


def test_a_tokenizer_reconstructs(visual: dict[str, Path]) -> None:
    demo = opened(visual["titok"])
    assert isinstance(demo, PictureTokenizerDemo)
    seen, made, note = demo.reconstruct(Image.new("RGBA", (40, 30), (200, 30, 30, 128)))
    assert seen.size == made.size == (256, 256)
    assert seen.getpixel((0, 0))[0] > 200 > seen.getpixel((0, 0))[1]
    assert "dB PSNR from 4 of 4 tokens: " in note
    with pytest.raises(ZooError, match="drop a picture first"):
        demo.reconstruct(None)


def test_flextok_takes_fewer_tokens(visual: dict[str, Path]) -> None:
    demo = opened(visual["flextok"])
    assert demo.ordered
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8))
    pictures = {k: demo.reconstruct(image, k, steps=2, guidance=1.0) for k in (1, 4)}
    assert pictures[1][1].tobytes() != pictures[4][1].tobytes()
    assert "1 of 4 tokens" in pictures[1][2]
    again = demo.reconstruct(image, 1, steps=2, guidance=1.0)
    assert again[1].tobytes() == pictures[1][1].tobytes()


def test_latents_and_embeddings(visual: dict[str, Path]) -> None:
    image = Image.new("RGB", (20, 20), "green")
    _, made, note = opened(visual["flextok_vae"]).reconstruct(image)
    assert made is not None
    assert "continuous latents" in note
    _, made, note = opened(visual["seed"]).reconstruct(image)
    assert made is None
    assert "4 of 4 tokens" in note
    assert "No picture: " in note


@pytest.mark.parametrize("family", ["maskgit", "rar"])
def test_a_generator_of_classes(visual: dict[str, Path], family: str) -> None:
    demo = opened(visual[family])
    assert isinstance(demo, PictureGeneratorDemo)
    assert demo.classes == ["cat", "dog", "owl"]
    assert demo.stepwise == (family == "maskgit")
    picture, note = demo.sample("dog", 2, steps=2)
    assert note == "2 pictures of 4 tokens each."
    assert picture.width > picture.height >= 256
    with pytest.raises(ZooError, match="'cow' is no class"):
        demo.sample("cow")


def test_enlargement_and_ids() -> None:
    assert nearest_up(Image.new("RGB", (10, 20)), 25).size == (30, 60)
    assert listed([1, 2]) == "1, 2"
    assert listed([7] * 40).endswith("7, ...")


# --- clips


def test_a_next_block_model_continues_a_dropped_clip(visual: dict[str, Path], tmp_path: Path) -> None:
    demo = opened(visual["nbp"])
    assert isinstance(demo, ClipGeneratorDemo)
    assert demo.continues
    file, note = demo.generate(str(gif(tmp_path / "in.gif", 5, 20)), given=1)
    with Image.open(file) as made:
        assert made.n_frames >= 2
        assert min(made.size) >= 256
    assert "passes, the first 1 latent frames given" in note
    with pytest.raises(ZooError, match="drop one, or start the page with --data"):
        demo.generate(None, given=1)
    with pytest.raises(ZooError, match="must be 1 to 1, got 2"):
        demo.generate(None, given=2)
    other, _ = demo.generate(str(tmp_path / "in.gif"), given=1, seed=1)
    assert Path(file).read_bytes() != Path(other).read_bytes()


class Source:
    """Three clips of five frames."""

    def __len__(self) -> int:
        return 3

    def batch(self, index: Any, epoch: int, step: int) -> dict[str, Any]:
        draw = np.random.default_rng(int(index[0]))
        return {"pixels": draw.random((1, 3, 5, 8, 8), np.float32)}


def test_a_clip_of_the_data_set(visual: dict[str, Path]) -> None:
    found = artifact.load(visual["nbp"])
    tokens = found.model.config.grid[1] * artifact.load(visual["nbp_tokenizer"]).model.factor[1]
    source = Source()
    demo = ClipGeneratorDemo(found, source=source)
    assert demo.samples == 3
    if tokens == 8:
        demo.generate(None, sample=2, given=1)
    with pytest.raises(ZooError, match="has clips 0 to 2, got 3"):
        demo.generate(None, sample=3, given=1)


def test_a_model_of_classes_begins_by_itself(visual: dict[str, Path]) -> None:
    demo = opened(visual["nbp_class"])
    assert not demo.continues
    assert demo.classes == ["walk", "run"]
    file, note = demo.generate(name="run", guidance=2.0)
    assert Path(file).stat().st_size > 100
    assert "given" not in note
    with pytest.raises(ZooError, match="'fly' is no class"):
        demo.generate(name="fly")


def test_a_video_tokenizer_reconstructs(visual: dict[str, Path], tmp_path: Path) -> None:
    demo = opened(visual["nbp_tokenizer"])
    assert isinstance(demo, ClipTokenizerDemo)
    demo.size, demo.frames = 16, 5
    file, note = demo.reconstruct(str(gif(tmp_path / "in.gif", 3)))
    with Image.open(file) as made:
        assert made.width == 2 * made.height
    assert note.startswith("5 frames of 16 x 16 pixels")
    with pytest.raises(ZooError, match="drop a clip first"):
        demo.reconstruct(None)


def test_clips_from_files(tmp_path: Path) -> None:
    assert read_clip(gif(tmp_path / "a.gif", 4), 4, 8, 12).shape == (1, 3, 4, 8, 12)
    with pytest.raises(ZooError, match="has 4 frames, 5 are needed"):
        read_clip(tmp_path / "a.gif", 5, 8, 8)
    assert read_clip(tmp_path / "a.gif", 5, 8, 8, pad=True).shape[2] == 5
    (tmp_path / "b.gif").write_bytes(b"no picture")
    with pytest.raises(ZooError, match="not a readable picture"):
        read_clip(tmp_path / "b.gif", 1, 8, 8)
    with pytest.raises(ZooError, match=r"'c\.txt' is no clip"):
        read_clip(tmp_path / "c.txt", 1, 8, 8)


# --- questions


def test_an_answer_and_what_it_costs(visual: dict[str, Path], tmp_path: Path) -> None:
    demo = opened(visual["mqt"])
    assert isinstance(demo, QuestionDemo)
    assert demo.most == 9
    Image.new("RGB", (30, 30), "red").save(tmp_path / "p.png")
    words, note = demo.answer(str(tmp_path / "p.png"), "what color is it?", 2)
    assert isinstance(words, str)
    assert note.startswith("2 of 9 visual tokens: ")
    assert "9 of 9 visual tokens: 100% of" in demo.answer(str(tmp_path / "p.png"), "what color is it?")[1]
    for file, question, complaint in ((None, "x", "drop a picture"), ("p.png", " ", "ask something")):
        with pytest.raises(ZooError, match=complaint):
            demo.answer(file, question)


# --- the command


def test_what_has_no_page(visual: dict[str, Path], models: dict[str, Path]) -> None:
    with pytest.raises(ZooError, match="--data is for next-block models, not for a TiTok"):
        opened(visual["titok"], data="moving_mnist")
    with pytest.raises(ZooError, match="the generator makes 4 ids"):
        opened(visual["maskgit"], tokenizer=str(visual["seed"].parent / "flextok"))


def test_the_command_without_gradio(zoo: Zoo, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    status, _, err = zoo("demo", models["letters"])
    assert status == 2
    assert err == "error: the page is made with Gradio, which is not installed: pip install 'seqzoo[demo]'\n"


def test_wrong_options(zoo: Zoo, models: dict[str, Path], tmp_path: Path) -> None:
    assert "--port must be 0 to 65535" in zoo("demo", models["letters"], "--port", "70000")[2]
    assert zoo("demo", tmp_path / "nothing")[0] == 2
