"""Clips: moving digits, files and folders of frames, cached tokens, tasks on them, and writing them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zoo import datamodules
from zoo.cli.clips import encode_clips, save_clips
from zoo.cli.evaluate import data_section
from zoo.cli.main import main
from zoo.config import from_dict
from zoo.datamodules.clip_tokens import ClipTokens, ClipTokensConfig
from zoo.datamodules.clips import clip_indices
from zoo.datamodules.manifest import FileConfig
from zoo.datamodules.moving_mnist import MovingMNIST, MovingMNISTConfig, bounce
from zoo.datamodules.videos import Video, VideoData, VideoDataConfig, fit_frame, read_frames, video_facts, write_video
from zoo.errors import ConfigError, ZooError
from zoo.hub import artifact
from zoo.models.nbp import NBP, NBPConfig
from zoo.models.nbp_tokenizer import NBPTokenizer, NBPTokenizerConfig
from zoo.nn.fsq import FSQConfig
from zoo.nn.mlp import MLPConfig
from zoo.tasks.next_block import NextBlock, NextBlockConfig
from zoo.tasks.video_reconstruction import VideoReconstruction, VideoReconstructionConfig
from zoo.train import videos as fit
from zoo.train.recipe import validate


def moving(**changes: object) -> MovingMNIST:
    data = MovingMNIST(MovingMNISTConfig(train=4, val=2, test=2, frames=6, **changes))  # type: ignore[arg-type]
    data.setup()
    return data


def tokenizer(patch: int = 4) -> NBPTokenizer:
    torch.manual_seed(0)
    config = NBPTokenizerConfig(
        widths=(4, 4, 8),
        blocks=1,
        groups=2,
        patch=patch,
        embed=2,
        fsq=FSQConfig(levels=(4, 4)),  # type: ignore[arg-type]
    )
    return NBPTokenizer(config)


# --- moving digits


def test_moving_digits_are_the_same_everywhere_and_differ_by_number() -> None:
    index = np.arange(2)
    a, b = (moving().sources["train"].batch(index, 0, 0)["pixels"] for _ in range(2))
    assert a.shape == (2, 3, 6, 64, 64)
    assert a.dtype == np.float32
    assert 0.5 < a.max() <= 1.0
    assert np.array_equal(a, b)
    assert not np.array_equal(a[0], a[1])
    other = moving().sources["val"].batch(index, 0, 0)["pixels"]
    assert not np.array_equal(a, other)
    assert not np.array_equal(a, moving(data_seed=1).sources["train"].batch(index, 0, 0)["pixels"])
    # a known clip, so that a change of the generator or of numpy's streams is noticed
    assert int(np.rint(a[0] * 255).sum()) == 2145561


def test_digits_bounce_within_the_frame() -> None:
    path = bounce(np.array([1.0, 9.0]), np.array([-2.0, 3.0]), 10, 30)
    assert path.min() >= 0
    assert path.max() <= 10
    assert np.abs(np.diff(path, axis=0)).max() <= 3
    assert path[:3, 0].tolist() == [1, 1, 3]
    assert bounce(np.zeros(2), np.ones(2), 0, 3).tolist() == [[0, 0]] * 3


def test_speed_zero_stands_still() -> None:
    clip = moving(speed=(0.0, 0.0)).sources["train"].clip(0)
    assert (clip == clip[0]).all()
    with pytest.raises(ValueError, match="lowest and the highest"):
        MovingMNISTConfig(speed=(2.0, 1.0))


# --- files and folders


def numbered(count: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames += (np.arange(count) * 20)[:, None, None, None].astype(np.uint8)
    return frames


def frame_folder(place: Path, count: int) -> None:
    place.mkdir(parents=True)
    for i, frame in enumerate(numbered(count)):
        Image.fromarray(frame).save(place / f"{i:03d}.png")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_written_video_is_read_back(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("av")
    file = tmp_path / f"clip{suffix}"
    write_video(numbered(), file, fps=10)
    assert video_facts(file) == (12, 10.0)
    frames = read_frames(file, np.array([0, 7, 3]))
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 3
    assert [round(float(frame.mean()) / 20) for frame in frames] == [0, 7, 3]


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(ZooError, match="not a readable video"):
        video_facts(tmp_path / "x.mp4")


def test_folders_of_frames_by_class(tmp_path: Path) -> None:
    for name, count in (("run/a", 8), ("run/b", 3), ("walk/c", 8)):
        frame_folder(tmp_path / name, count)
    data = VideoData(VideoDataConfig(train=(FileConfig(path=str(tmp_path)),), frames=5, size=16, strategy="center"))
    data.setup()
    source = data.sources["train"]
    batch = source.batch(np.arange(3), 0, 0)
    assert data.classes == ("run", "walk")
    assert batch["labels"].tolist() == [0, 0, 1]
    assert batch["pixels"].shape == (3, 3, 5, 16, 16)
    values = np.rint(batch["pixels"][:, 0, :, 8, 8] * 255 / 20)
    assert values.tolist() == [[2, 3, 4, 5, 6], [0, 1, 2, 0, 0], [2, 3, 4, 5, 6]]  # short videos end in black


def test_random_windows_depend_on_the_pass_in_training_alone(tmp_path: Path) -> None:
    frame_folder(tmp_path / "a", 12)
    config = VideoDataConfig(train=(FileConfig(path=str(tmp_path)),), frames=3, size=8, clips_per_video=6)
    data = VideoData(config, seed=3)
    data.setup()
    source = data.sources["train"]
    starts = lambda epoch: [int(source.clip(i, epoch)[0, 0, 0, 0]) for i in range(6)]
    assert len(source) == 6
    assert starts(0) == starts(1)
    source.augment = True
    assert starts(0) != starts(1)
    assert starts(1) == starts(1)
    with pytest.raises(ValueError, match="always takes the same"):
        VideoDataConfig(train=config.train, strategy="center", clips_per_video=2)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    data = VideoData(VideoDataConfig(train=(FileConfig(path=str(tmp_path)),)))
    with pytest.raises(ZooError, match="holds no video"):
        data.setup()


def test_the_embedded_clips_are_whole() -> None:
    pytest.importorskip("av")
    data = datamodules.build(datamodules.section("bsd_clips"), None)
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 40, "val": 20}
    assert data.sources["val"].batch(np.array([0]), 0, 0)["pixels"].shape == (1, 3, 17, 64, 64)


# --- tokens


def token_file(place: Path, ids: torch.Tensor, vocab: int = 16, **extra: torch.Tensor) -> FileConfig:
    save_file(
        {"ids": ids.contiguous(), **extra},
        place,
        metadata={"vocab_size": str(vocab), "tokenizer": "t", "classes": json.dumps([])},
    )
    return FileConfig(path=str(place))


def test_cached_clips_are_read_and_checked(tmp_path: Path) -> None:
    ids = torch.randint(16, (5, 2, 4, 4), generator=torch.Generator().manual_seed(0)).int()
    good = token_file(tmp_path / "a.safetensors", ids)
    data = ClipTokens(ClipTokensConfig(train=(good,), val=(good,), batch_size=2))
    data.setup()
    assert data.grid == (2, 4, 4)
    batch = next(iter(data.loader("val")))
    assert torch.equal(torch.as_tensor(batch["ids"]), ids[:2].long())
    assert batch["labels"].tolist() == [-1, -1]
    flat = token_file(tmp_path / "b.safetensors", ids.flatten(1))
    with pytest.raises(ZooError, match=r"expected those of clips, \[N, T, H, W\]"):
        ClipTokens(ClipTokensConfig(train=(flat,))).setup()
    small = token_file(tmp_path / "c.safetensors", ids, vocab=4)
    with pytest.raises(ZooError, match="its tokenizer has 4 codes"):
        ClipTokens(ClipTokensConfig(train=(small,))).setup()
    other = token_file(tmp_path / "d.safetensors", ids[:, :1])
    with pytest.raises(ZooError, match="another tokenizer"):
        ClipTokens(ClipTokensConfig(train=(good,), val=(other,))).setup()


def nbp(**changes: object) -> NBPConfig:
    return NBPConfig(
        **{  # type: ignore[arg-type]
            "d_model": 16, "n_layer": 1, "options": {"heads": 2}, "mlp": MLPConfig(kind="gelu", width=32),
            "video_vocab": 16, "grid": (2, 4, 4), "block": 4, "max_len": 64, **changes,
        }
    )  # fmt: skip


def test_model_and_tokens_must_fit(tmp_path: Path) -> None:
    ids = torch.zeros(3, 2, 4, 4, dtype=torch.int32)
    data = ClipTokens(ClipTokensConfig(train=(token_file(tmp_path / "a.safetensors", ids),)))
    data.setup()
    recipe = validate({
        "name": "x", "model": {"name": "nbp"}, "data": {"name": "clip_tokens", "train": [{"path": "a"}]},
        "task": {"name": "next_block"}, "trainer": {"max_steps": 1},
    })  # fmt: skip
    fit.check_fit(recipe, nbp(), data)
    for config, message in (
        (nbp(grid=(2, 4, 8)), r"model.grid is \[2, 4, 8\]"),
        (nbp(video_vocab=8), "model.video_vocab is 8"),
        (nbp(cond_vocab=3, cond_tokens=1), "some of the cached clips have none"),
        (nbp(cond_vocab=3, cond_tokens=2), "set it to 1"),
    ):
        with pytest.raises(ZooError, match=message):
            fit.check_fit(recipe, config, data)


def test_next_block_counts_what_the_model_predicts() -> None:
    torch.manual_seed(0)
    model = NBP(nbp(cond_vocab=3, cond_tokens=1, embed_dropout=0.0, resid_dropout=0.0))
    task = NextBlock(model, NextBlockConfig())
    batch = {"ids": torch.randint(16, (3, 2, 4, 4)), "labels": torch.tensor([0, 1, 2]), "index": torch.arange(3)}
    loss, weight = task.compute(batch, "val")
    assert int(weight) == 3 * (32 - 4)
    assert torch.allclose(loss, model.loss(batch["ids"], batch["labels"])["loss"])
    found = task.finish("val")
    assert 0 <= float(found["acc1"]) <= float(found["acc5"]) <= 100
    with pytest.raises(ZooError, match="trains an NBP, not a Linear"):
        NextBlock(torch.nn.Linear(1, 1), NextBlockConfig())


def test_reconstruction_of_clips_counts_frames() -> None:
    model = tokenizer()
    task = VideoReconstruction(model, VideoReconstructionConfig(reconstruction="mse"))
    clips = torch.rand(2, 3, 5, 16, 16)
    loss, weight = task.compute({"pixels": clips, "index": torch.arange(2)}, "val")
    assert int(weight) == 10
    assert torch.allclose(loss, (model(clips).output - clips).square().mean(), rtol=1e-5)
    assert float(task.finish("val")["psnr"]) < 20
    with pytest.raises(ZooError, match="trains a video tokenizer, not a NBP"):
        VideoReconstruction(NBP(nbp()), VideoReconstructionConfig())


# --- the tokenizer with patches, and its clips


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_keep_the_tokenizer_causal_and_its_grid(patch: int) -> None:
    model = tokenizer(patch).eval()
    clip = torch.rand(1, 3, 9, 16, 24)
    ids = model.encode(clip)
    assert ids.shape == (1, *model.grid(9, 16, 24)) == (1, 3, 2, 3)
    assert torch.equal(model.encode(clip[:, :, :5]), ids[:, :2])
    assert model.decode(ids).shape == clip.shape
    assert torch.equal(model.decode(ids)[:, :, :5], model.decode(ids[:, :2])) or torch.allclose(
        model.decode(ids)[:, :, :5], model.decode(ids[:, :2]), atol=1e-5
    )


def test_clips_are_tokenized_in_order() -> None:
    model = tokenizer().eval()
    source = moving_of_five().sources["val"]
    ids, labels = encode_clips(model, source, batch=1)
    whole, _ = encode_clips(model, source, batch=8)
    assert ids.shape == (2, 2, 8, 8)
    assert labels.tolist() == [-1, -1]
    assert torch.equal(ids, whole)


def moving_of_five() -> MovingMNIST:
    data = MovingMNIST(MovingMNISTConfig(train=1, val=2, test=0, frames=5))
    data.setup()
    return data


# --- writing


@pytest.mark.parametrize("suffix", [".gif", ".png", ".mp4"])
def test_clips_are_written(tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    clips = torch.zeros(3, 3, 4, 16, 16)
    clips[1] = 1.0
    file = tmp_path / f"x{suffix}"
    save_clips(clips, file, columns=2)
    if suffix == ".png":
        assert Image.open(file).size == (64, 48)
        assert Image.open(file).getpixel((5, 20)) == (255, 255, 255)
    elif suffix == ".gif":
        image = Image.open(file)
        assert image.size == (32, 32)
        assert image.n_frames >= 1
    else:
        assert video_facts(file)[0] == 4
    with pytest.raises(ZooError, match="must end in one of"):
        save_clips(clips, tmp_path / "x.txt")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="frame"):
        from_dict(MovingMNISTConfig, {"framez": 3}, "data")


# --- commands


def test_commands_tokenize_and_continue_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.save(tokenizer(), tmp_path / "tok")
    sheet = tmp_path / "set.yaml"
    sheet.write_text("name: moving_mnist\nframes: 5\nsize: 32\ntrain: 2\nval: 2\ntest: 3\n")
    ids = tmp_path / "ids.safetensors"
    tokenize = ["tokenize", str(tmp_path / "tok"), "--data", str(sheet), "-o", str(ids)]
    assert main(tokenize) == 0
    assert "3 clips of 2 x 4 x 4 ids out of 16" in capsys.readouterr().out
    data = ClipTokens(ClipTokensConfig(train=(FileConfig(path=str(ids)),)))
    data.setup()
    assert data.grid == (2, 4, 4)
    assert data.first.tokenizer == str(tmp_path / "tok")
    assert main([*tokenize, "--flip"]) == 2
    assert "are for pictures" in capsys.readouterr().err

    artifact.save(NBP(nbp()), tmp_path / "nbp")
    go = ["generate", str(tmp_path / "nbp"), "--tokenizer", str(tmp_path / "tok"), "--num", "2", "--given", "1"]
    out = tmp_path / "clips.png"
    assert main([*go, "--continue", str(sheet), "-o", str(out)]) == 0
    assert "2 clips, 4 passes" in capsys.readouterr().out
    assert Image.open(out).size == (5 * 32, 2 * 32)
    assert main([*go, "-o", str(out)]) == 2
    assert "this model continues clips" in capsys.readouterr().err
    artifact.save(NBP(nbp(hybrid=True)), tmp_path / "hybrid")
    assert main(["generate", str(tmp_path / "hybrid"), *go[2:], "-o", str(tmp_path / "x.gif")]) == 0
    assert "2 clips, 11 passes" in capsys.readouterr().out


def test_commands_measure_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.save(tokenizer(), tmp_path / "tok")
    artifact.save(NBP(nbp()), tmp_path / "nbp")
    sheet = tmp_path / "set.yaml"
    sheet.write_text("name: moving_mnist\nframes: 5\nsize: 32\ntrain: 2\nval: 2\ntest: 3\nbatch_size: 2\n")
    assert main(["eval", str(tmp_path / "tok"), "--data", str(sheet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert set(found) == {"test/psnr", "test/ssim", "test/psnr_first_frame", "test/psnr_last_frame"}
    ask = ["eval", str(tmp_path / "nbp"), "--data", str(sheet), "--tokenizer", str(tmp_path / "tok"), "--given", "1"]
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    clips = torch.from_numpy(moving_source(sheet).batch(np.arange(3), 0, 0)["pixels"])
    still = -10 * torch.log10((clips[:, :, 1] - clips[:, :, 0]).square().mean((1, 2, 3)))
    assert found["test/copy_psnr_next_frame"] == pytest.approx(float(still.mean()), rel=1e-5)
    assert found["test/psnr_next_4"] < found["test/tokenizer_psnr_next_4"] + 3
    assert main(["eval", str(tmp_path / "tok"), "--data", str(sheet), "--i3d", str(tmp_path / "none.pt")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command_shows_reconstructions_frame_by_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tokenizer()
    artifact.save(model, tmp_path / "tok")
    street = Path(__file__).resolve().parents[2] / "datamodules/bsd_clips/bikes.mp4"
    go = ["reconstruct", str(tmp_path / "tok"), str(street), "--size", "32", "--frames", "5"]
    for name, size in (("strip.png", (5 * 32, 2 * 32)), ("pair.gif", (2 * 32, 32))):
        assert main([*go, "-o", str(tmp_path / name)]) == 0
        assert Image.open(tmp_path / name).size == size
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5", "all"]
    indices, _ = clip_indices(100, 5)
    frames = [fit_frame(frame, 32, "short") for frame in Video(street, 25).read(indices)]
    real = torch.from_numpy(np.stack(frames).transpose(3, 0, 1, 2)[None]).float() / 255
    with torch.no_grad():
        fake = model.eval().decode(model.encode(real)).clamp(0, 1)
    error = (real - fake).square().mean((0, 1, 3, 4))
    assert [float(line[1]) for line in lines[:5]] == pytest.approx((-10 * error.log10()).tolist(), abs=0.006)

    assert main([*go[:-1], "101", "-o", str(tmp_path / "x.png")]) == 2
    assert "has 100 frames, fewer than the 101 of a clip" in capsys.readouterr().err
    assert main([*go, "--tokens", "4", "-o", str(tmp_path / "x.png")]) == 2
    assert "decodes all of a clip's tokens" in capsys.readouterr().err
    assert main([*go, "--data", "moving_mnist", "-o", str(tmp_path / "x.png")]) == 2
    assert "and not both" in capsys.readouterr().err
    sheet = tmp_path / "set.yaml"
    sheet.write_text("name: moving_mnist\nframes: 9\nsize: 64\ntrain: 2\nval: 2\ntest: 3\n")
    small = ["--size", "32", "--frames", "5", "--limit", "2", "-o", str(tmp_path / "digits.png")]
    assert main(["reconstruct", str(tmp_path / "tok"), "--data", str(sheet), *small]) == 0
    assert Image.open(tmp_path / "digits.png").size == (5 * 32, 4 * 32)


def test_the_tutorial_shows_what_was_measured() -> None:
    root = Path(__file__).resolve().parents[2]
    file = root / "benchmarks" / "results" / "next_block.json"
    page = (root / "docs" / "tutorials" / "video.md").read_text()
    found = json.loads(file.read_text())
    for row in found["rows"]:
        shown = f"| {row['block']} | {row['steps']} | {row['frames_per_second']:.1f} | {row['speedup']:.1f}x "
        shown += f"| {row['val_loss']:.2f} |"
        for key in ("psnr_next_frame", "psnr_next_4"):
            shown += f" {row[key]:.2f} |" if key in row else " - |"
        assert shown in page
    for floor in found["floors"].values():
        assert f"| {floor['psnr_next_frame']:.2f} | {floor['psnr_next_4']:.2f} |" in page


def moving_source(sheet: Path):  # type: ignore[no-untyped-def]
    data = datamodules.build(data_section(str(sheet), []), None)
    data.setup()
    return data.sources["test"]
