"""The commands on pictures, at a size that takes a moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from zoo.hub import artifact
from zoo.models.flextok import FlexTok, FlexTokConfig
from zoo.models.maskgit import MaskGIT, MaskGITConfig
from zoo.models.rar import RAR, RARConfig
from zoo.models.titok import TiTok, TiTokConfig
from zoo.nn.fsq import FSQConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.vit import ViTConfig

VIT = ViTConfig(width=16, layers=1, heads=2, mlp=MLPConfig(kind="gelu", width=32))


class Place(NamedTuple):
    root: Path
    titok: Path
    flextok: Path
    pictures: Path
    data: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    fsq, small = FSQConfig(levels=(4, 4)), PreprocessConfig(size=16)
    titok = TiTok(
        TiTokConfig(
            encoder=VIT, decoder=VIT, encoder_patch=8, decoder_patch=8, latents=4, bottleneck="fsq", fsq=fsq,
            init="scaled", preprocess=small,
        )
    )  # fmt: skip
    wide = ViTConfig(width=16, layers=1, heads=2, adaln=True, adaln_groups=2)
    flextok = FlexTok(
        FlexTokConfig(
            pixel_space=True, channels=3, latent_size=16, patch=8, registers=4, fsq=fsq, encoder=VIT, decoder=wide,
            preprocess=small,
        )
    )  # fmt: skip
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / "set" / split / name).mkdir(parents=True)
            for i in range(3):
                noise = np.random.default_rng(10 * number + i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / "set" / split / name / f"{i}.png")
    data = root / "set.yaml"
    data.write_text(
        f"name: images\nid: pets\nroot: {root / 'set'}\ntrain: {{path: train}}\ntest: {{path: test}}\n"
        "preprocess: {size: 16}\n"
    )
    saved = [artifact.save(model.eval(), root / name) for name, model in (("titok", titok), ("flextok", flextok))]
    return Place(root, *saved, root / "set" / "test", data)


def test_tokenize_then_detokenize(zoo: Callable[..., Any], place: Place, tmp_path: Path) -> None:
    out = tmp_path / "ids.safetensors"
    done = zoo("tokenize", place.titok, place.pictures, "-o", out, "--batch-size", "4")
    assert done.status == 0, done.err
    with safe_open(out, "pt") as stored:
        ids, about = stored.get_tensor("ids"), stored.metadata()
    assert ids.shape == (6, 4)
    assert about["vocab_size"] == "16"
    assert json.loads(about["names"])[0] == "cat/0.png"
    model: Any = artifact.load(place.titok).model
    done = zoo("detokenize", place.titok, out, "-o", tmp_path / "back")
    assert done.status == 0, done.err
    files = sorted((tmp_path / "back").iterdir())
    assert len(files) == 6
    expected = (model.decode(ids[:1].long())[0].clamp(0, 1) * 255).round().byte()
    shown = torch.from_numpy(np.asarray(Image.open(files[0])).transpose(2, 0, 1).copy())
    assert (shown.int() - expected.int()).abs().max() <= 1
    assert zoo("detokenize", place.titok, out, "-o", tmp_path / "sheet.png").status == 0
    assert Image.open(tmp_path / "sheet.png").size[0] >= 2 * 16


def test_data_sets_give_labels_views_and_shards(zoo: Callable[..., Any], place: Place, tmp_path: Path) -> None:
    done = zoo(
        "tokenize", place.titok, "--data", place.data, "--split", "train", "--flip", "--shard-size", "4", "-o",
        tmp_path / "t.safetensors",
    )  # fmt: skip
    assert done.status == 0, done.err
    parts = sorted(tmp_path.glob("t-*.safetensors"))
    assert [part.name for part in parts] == ["t-00000.safetensors", "t-00001.safetensors"]
    from zoo.datamodules.token_cache import read_cache

    cache = read_cache(parts)
    assert cache.ids.shape == (6, 2, 4)
    assert cache.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert cache.classes == ("cat", "dog")


def test_reconstruct_sweeps_the_tokens_of_flextok(zoo: Callable[..., Any], place: Place, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    options = ("--steps", "2", "--guidance", "1")
    done = zoo("reconstruct", place.flextok, "--data", place.data, "-o", sheet, *options)
    assert done.status == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[1:4]] == ["1", "2", "4"]
    assert Image.open(sheet).size[0] == 4 * 18 + 2
    again = zoo("reconstruct", place.flextok, "--data", place.data, "-o", sheet, *options)
    assert again.out == done.out, "the same seed gives the same pictures"
    done = zoo("reconstruct", place.titok, place.pictures / "cat" / "0.png", "-o", sheet)
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 3


def test_eval_measures_reconstructions(zoo: Callable[..., Any], place: Place) -> None:
    from zoo.models.visual import to_uint8

    done = zoo("eval", place.titok, "--data", place.data, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    model: Any = artifact.load(place.titok).model
    from zoo.datamodules.pictures import fit, open_rgb
    from zoo.nn.image_metrics import psnr

    files = sorted(place.pictures.rglob("*.png"))
    pixels = torch.from_numpy(np.stack([fit(open_rgb(f), model.config.preprocess) for f in files])).float() / 255
    real, fake = (to_uint8(x).float() / 255 for x in (pixels, model.decode(model.encode(pixels))))
    assert report["metrics"]["test/psnr"] == pytest.approx(float(psnr(fake, real).mean()), abs=1e-6)
    assert 0 < report["metrics"]["test/code_usage"] <= 1
    assert any("8 bits" in line for line in report["protocol"])


def test_eval_with_a_foreign_extractor_says_so(zoo: Callable[..., Any], place: Place, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    torch.save(resnet18(weights=None, num_classes=3).state_dict(), tmp_path / "net.pth")
    spec = f"resnet18:{tmp_path / 'net.pth'}"
    done = zoo("eval", place.titok, "--data", place.data, "--extractor", spec)
    assert done.status == 0, done.err
    assert "NOT COMPARABLE" in done.out.splitlines()[0]
    assert "rfid" in done.out
    done = zoo("eval", place.titok, "--data", place.data, "--extractor", spec, "--extractor-sha256", "0" * 64)
    assert done.status == 2
    assert "sha256" in done.err


@pytest.fixture(scope="module")
def generators(place: Place) -> dict[str, Path]:
    torch.manual_seed(1)
    vit = ViTConfig(width=16, layers=1, heads=2, prenorm=False)
    ada = ViTConfig(width=16, layers=1, heads=2, qk_norm="affine", adaln=True)
    models = {
        "maskgit": MaskGIT(MaskGITConfig(codes=16, classes=2, length=4, vit=vit)),
        "rar": RAR(RARConfig(codes=16, classes=2, length=4, vit=ada)),
    }
    run = {
        "name": "made",
        "data": {"visual_tokenizer": str(place.titok), "classes": ["cat", "dog"], "task_kind": "image"},
    }
    return {name: artifact.save(model.eval(), place.root / name, run=run) for name, model in models.items()}


@pytest.mark.parametrize("family", ["maskgit", "rar"])
def test_generate_draws_a_grid(
    family: str, zoo: Callable[..., Any], generators: dict[str, Path], place: Place, tmp_path: Path
) -> None:
    sheets = []
    for number, classes in enumerate(("cat,dog", "dog", "1")):
        sheet = tmp_path / f"{number}.png"
        done = zoo("generate", generators[family], "--num", "3", "--classes", classes, "--seed", "7", "-o", sheet)
        assert done.status == 0, done.err
        sheets.append(np.asarray(Image.open(sheet)))
    both, alone, by_number = sheets
    assert both.shape[1] == 2 * 18 + 2
    assert np.array_equal(both[16:, 20:36], alone[16:, 2:18]), "a class is drawn alike whichever others are asked for"
    assert np.array_equal(alone[16:], by_number[16:])
    done = zoo("generate", generators[family], "--classes", "bird", "-o", tmp_path / "x.png")
    assert done.status == 2
    assert "no class" in done.err
    other = zoo("generate", generators[family], "--tokenizer", place.flextok, "--num", "1", "-o", tmp_path / "y.png")
    assert other.status == 0, other.err


def test_eval_of_a_generator(
    zoo: Callable[..., Any], generators: dict[str, Path], place: Place, tmp_path: Path
) -> None:
    from torchvision.models import resnet18

    torch.save(resnet18(weights=None, num_classes=3).state_dict(), tmp_path / "net.pth")
    spec = f"resnet18:{tmp_path / 'net.pth'}"
    done = zoo("eval", generators["maskgit"], "--data", place.data, "--extractor", spec, "--json")
    assert done.status == 0, done.err
    metrics = json.loads(done.out)["metrics"]
    assert metrics["test/gfid"] > 0
    assert metrics["test/is"] >= 1
    done = zoo("eval", generators["maskgit"], "--data", place.data)
    assert done.status == 2
    assert "--extractor" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenize", "{titok}", "-o", "x.safetensors"), "name picture files"),
        (("tokenize", "{titok}", "nowhere.png", "-o", "x.safetensors"), "does not exist"),
        (("tokenize", "{titok}", "{pictures}", "-o", "x.npz"), "must end in .safetensors"),
        (("reconstruct", "{titok}", "{pictures}", "-o", "x.jpg"), "must end in .png"),
        (("reconstruct", "{titok}", "{pictures}", "-o", "x.png", "--tokens", "2"), "decodes all of its 4 tokens"),
        (("reconstruct", "{flextok}", "{pictures}", "-o", "x.png", "--tokens", "9"), "from 1 to 4"),
        (("detokenize", "{titok}", "{data}", "-o", "x.png"), "no token file"),
        (("tokenize", "{titok}", "--data", "uci_splice", "-o", "x.safetensors"), "tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], message: str, zoo: Callable[..., Any], place: Place, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zoo(*(part.format(**place._asdict()) for part in arguments))
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes", "parameters"),
    [
        ("titok_s128_imagenet_stage1", (), 52_934_156),
        ("titok_bl128_imagenet", ("task.perceptual_weight=0",), 390_179_988),
        ("flextok_d12_imagenet", (), 341_258_521),
        ("maskgit_b64_imagenet", (), 177_227_008),
        ("rar_b_imagenet", (), 260_923_648),
    ],
)
def test_full_sizes_describe_themselves(
    recipe: str, changes: tuple[str, ...], parameters: int, zoo: Callable[..., Any], tmp_path: Path
) -> None:
    if recipe.startswith(("maskgit", "rar")):
        codes, length = (4096, 64) if recipe.startswith("maskgit") else (1024, 256)
        tensors = {"ids": torch.zeros(64 * 32, length).int(), "labels": torch.zeros(64 * 32).long()}
        save_file(tensors, tmp_path / "train-000.safetensors", metadata={"vocab_size": str(codes)})
        changes = (f"data.root={tmp_path}",)
    else:
        changes = ("data=emoji64", "data.preprocess.size=256", *changes)
    done = zoo("train", recipe, *changes, "--dry-run")
    assert done.status == 0, done.err
    assert f"{parameters:,}" in done.out
    assert ("tokens a step" if recipe.startswith(("maskgit", "rar")) else "samples a step") in done.out
