"""Pictures from folders, tar files and packages: the same pixels from each, the official preprocessing, a set order."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from zoo import datamodules
from zoo.datamodules.pictures import fit, open_rgb, resize, to_array
from zoo.errors import ConfigError, ZooError
from zoo.nn.preprocess import PreprocessConfig, fit_pixels

SIZE = {"preprocess": {"size": 16}}


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "png")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 5), ("val", 2)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.png").write_bytes(png(100 * number + i))
    return tmp_path


def write_tar(file: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(file, "w") as archive:
        for key, members in rows:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def images(root: Path, **changes: Any) -> Any:
    section = {"name": "images", "root": str(root), "train": {"path": "train"}, "val": {"path": "val"}, "batch_size": 4}
    data: Any = datamodules.build({**section, **SIZE, **changes}, None, 3)
    data.setup()
    return data


def test_folders_give_classes_pixels_and_digests(folder: Path) -> None:
    data = images(folder)
    assert data.classes == ("cat", "dog")
    assert [len(data.sources[split]) for split in ("train", "val")] == [10, 4]
    batch = next(iter(data.loader("val")))
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert torch.equal(batch["pixels"][2], torch.from_numpy(to_array(picture(100))).float() / 255)
    assert len(data.files()) == 2


def test_shards_give_the_same_pictures_as_folders(folder: Path, tmp_path: Path) -> None:
    rows = [(f"{i:04d}", {"png": png(100 * (i // 5) + i % 5), "cls": str(i // 5).encode()}) for i in range(10)]
    write_tar(tmp_path / "a-000.tar", rows[:6])
    write_tar(tmp_path / "a-001.tar", rows[6:])
    by_folder = images(folder).loader("train", train=False)
    for path in ("a-{000..001}.tar", "a-*.tar"):
        section = {"name": "shards", "root": str(tmp_path), "train": [{"path": path}], "batch_size": 4, **SIZE}
        data: Any = datamodules.build(section, None, 3)
        data.setup()
        assert len(data.files()) == 2
        for ours, theirs in zip(data.loader("train", train=False), by_folder, strict=True):
            assert torch.equal(ours["pixels"], theirs["pixels"])
            assert torch.equal(ours["labels"], theirs["labels"])


def test_shards_read_labels_from_json(tmp_path: Path) -> None:
    rows = [(str(i), {"png": png(i), "json": json.dumps({"kind": k}).encode()}) for i, k in enumerate(("b", "a"))]
    write_tar(tmp_path / "x.tar", rows)
    section = {"name": "shards", "root": str(tmp_path), "train": [{"path": "x.tar"}], "label": "kind", **SIZE}
    data: Any = datamodules.build({**section, "classes": ["a", "b"]}, None)
    data.setup()
    assert data.sources["train"].reader.labels.tolist() == [1, 0]
    with pytest.raises(ZooError, match="none of the classes"):
        datamodules.build({**section, "classes": ["a", "c"]}, None).setup()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([("1", {"txt": b"hello"})], "no picture"), ([("1", {"png": b"not a picture", "cls": b"0"})], "not a readable")],
)
def test_bad_shards_are_one_sentence(tmp_path: Path, rows: Any, message: str) -> None:
    write_tar(tmp_path / "x.tar", rows)
    data: Any = datamodules.build(
        {"name": "shards", "root": str(tmp_path), "train": [{"path": "x.tar"}], "batch_size": 1, **SIZE}, None
    )
    with pytest.raises(ZooError, match=message):
        next(iter(data.loader("train")))
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    broken: Any = datamodules.build({"name": "shards", "root": str(tmp_path), "train": [{"path": "y.tar"}]}, None)
    with pytest.raises(ZooError, match="tar file"):
        broken.setup()


def test_wrong_folders_are_one_sentence(folder: Path) -> None:
    with pytest.raises(ZooError, match="none of the class folders"):
        images(folder, classes=["cat"])
    with pytest.raises(ZooError, match="not the one"):
        images(folder, train={"path": "train", "sha256": "0" * 64})
    with pytest.raises(ConfigError, match="builtin"):
        datamodules.build({"name": "images"}, None)
    (folder / "empty").mkdir()
    with pytest.raises(ZooError, match="holds no picture"):
        images(folder, train={"path": "empty"})


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (20, 16)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_fitting_is_what_torchvision_does_to_pil_pictures(size: tuple[int, int], kernel: Any) -> None:
    modes = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
    official = transforms.Compose([transforms.Resize(16, modes[kernel]), transforms.CenterCrop(16)])
    image = picture(0, size)
    ours = fit(image, PreprocessConfig(size=16, kernel=kernel))
    assert np.array_equal(ours, to_array(official(image)))
    tensor = torch.from_numpy(to_array(image)).float() / 255
    ours_plain = fit(image, PreprocessConfig(size=16, kernel=kernel, antialias=False))
    expected = fit_pixels(tensor, PreprocessConfig(size=16, kernel=kernel, antialias=False))
    assert np.abs(ours_plain - expected.numpy() * 255).max() <= 0.5 + 1e-3


def test_squeezing_and_leaving_alone() -> None:
    image = picture(0, (40, 30))
    assert resize(image, PreprocessConfig(size=16, resize="both")).size == (16, 16)
    assert fit(image, PreprocessConfig(size=16, resize="none")).shape == (3, 16, 16)
    with pytest.raises(ZooError, match="smaller"):
        fit(picture(0, (8, 30)), PreprocessConfig(size=16, resize="none"))


def test_transparent_pictures_lie_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(out, "png")
    assert open_rgb(out.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_augmentation_is_a_function_of_seed_pass_and_sample(folder: Path) -> None:
    changes = {"flip": True, "shift": 3, "shuffle_channels": True}
    one, other = (images(folder, augment=changes, cache=cache).sources["train"] for cache in (False, True))
    one.augment = other.augment = True
    index = np.arange(10)
    first, again = one.batch(index, 4, 0)["pixels"], other.batch(index[::-1], 4, 99)["pixels"][::-1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, one.batch(index, 5, 0)["pixels"])
    one.augment = False
    assert np.array_equal(one.batch(index[:1], 4, 0)["pixels"][0] * 255, to_array(picture(0)))
    flipped = images(folder, augment={"flip": True}).sources["train"]
    flipped.augment = True
    plain = to_array(picture(0))
    seen = [flipped.batch(index[:1], epoch, 0)["pixels"][0] * 255 for epoch in range(8)]
    assert any(np.array_equal(x, plain) for x in seen)
    assert any(np.array_equal(x, plain[:, :, ::-1]) for x in seen)


def test_random_crops_come_from_the_resized_picture(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture(0, (48, 32)).save(tmp_path / "train" / "x.png")
    data: Any = datamodules.build(
        {"name": "images", "root": str(tmp_path), "train": {"path": "train"}, "augment": {"random_crop": True}, **SIZE},
        None,
    )
    data.setup()
    source = data.sources["train"]
    whole = to_array(resize(picture(0, (48, 32)), PreprocessConfig(size=16)))
    assert whole.shape == (3, 16, 24)
    source.augment = True
    places = set()
    for epoch in range(30):
        cut = (source.batch(np.array([0]), epoch, 0)["pixels"][0] * 255).round().astype(np.uint8)
        places |= {left for left in range(9) if np.array_equal(whole[:, :, left : left + 16], cut)}
    assert {0, 8} < places
    assert source.reader.labels.tolist() == [-1]


def test_digits_and_holding_out(folder: Path) -> None:
    pytest.importorskip("sklearn")
    data: Any = datamodules.build(datamodules.section("digits"), None)
    data.setup()
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [1438, 179, 180]
    assert data.files() == []
    section = {"name": "images", "root": str(folder), "train": {"path": "train"}, "val_fraction": 0.2, **SIZE}
    held: Any = datamodules.build(section, None)
    held.setup()
    names = [set(held.sources[split].reader.names) for split in ("train", "val")]
    assert [len(part) for part in names] == [8, 2]
    assert not names[0] & names[1]


def test_torchvision_sets_are_not_downloaded(tmp_path: Path) -> None:
    data: Any = datamodules.build({"name": "images", "builtin": "cifar10", "root": str(tmp_path)}, None)
    with pytest.raises(ZooError, match="finds no CIFAR10"):
        data.setup()
    assert not list(tmp_path.iterdir())


def test_torchvision_sets_are_read(tmp_path: Path) -> None:
    import struct

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 6), ("t10k", 2)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(count)))
    section = {"name": "images", "builtin": "mnist", "root": str(tmp_path), "val_fraction": 0.3}
    data: Any = datamodules.build({**section, "preprocess": {"size": 28}}, None)
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 4, "val": 2, "test": 2}
    batch = next(iter(data.loader("test")))
    assert batch["pixels"].shape == (2, 3, 28, 28)
    assert batch["labels"].tolist() == [0, 1]


def test_emoji_are_shipped(root: Path) -> None:
    data: Any = datamodules.build(datamodules.section("emoji64"), None)
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 1120, "val": 128, "test": 160}
    assert len(data.classes) == 8
    assert next(iter(data.loader("val")))["pixels"].shape[1:] == (3, 64, 64)
    assert sum(file.stat().st_size for file in (root / "datamodules" / "emoji64").iterdir()) < 8_000_000


def test_clothing_is_read(shared: Path) -> None:
    place = shared / "data" / "clothing64"
    if not place.is_dir():
        pytest.skip("clothing64 is not on this machine")
    data: Any = datamodules.build(datamodules.section("clothing64", root=str(place)), None)
    data.setup()
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 3068, "val": 341, "test": 372}
