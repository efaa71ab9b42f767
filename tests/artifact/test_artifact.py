"""The artifact: whole or not there, exactly what was saved, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo import tokenizers
from zoo.errors import ZooError
from zoo.hub import artifact, files
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn.heads import HeadConfig


def model(**changes: Any) -> HyenaDNA:
    torch.manual_seed(3)
    return HyenaDNA(HyenaDNAConfig(**{"d_model": 8, "n_layer": 1, "max_len": 40, **changes}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    head = HeadConfig(kind="sequence", num_outputs=3)
    run = {"name": "test run", "data": {"task_kind": "multiclass", "classes": ["a", "b", "c"]}}
    return zoo.save(model(head=head), tmp_path / "art", tokenizer=tokenizers.from_catalogue("dna-char"), run=run)


def resign(place: Path) -> None:
    """Make the listing agree with what lies there, as someone would who changes an artifact on purpose."""
    files.write_json(place / files.FILES, {"schema": files.SCHEMA, "files": files.listing(place)})


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    one, two = model(head=HeadConfig(kind="sequence", num_outputs=3)), zoo.load(saved)
    assert two.config == one.config
    assert not two.model.training
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
    assert two.classes == ["a", "b", "c"]
    assert two.tokenizer.encode("ACGT").tolist() == [7, 8, 9, 10, 1]
    assert two.run["name"] == "test run"
    ids = torch.randint(7, 11, (2, 12))
    assert torch.equal(one.eval()(ids), two.model(ids))


def test_files_are_as_readable_as_the_umask_says(saved: Path) -> None:
    modes = {file.stat().st_mode & 0o777 for file in saved.iterdir()}
    assert len(modes) == 1


def test_verify_replays_the_outputs(saved: Path) -> None:
    assert [(check.name, check.passed, check.ratio) for check in zoo.verify(saved)] == [
        ("hidden", True, 0.0),
        ("logits", True, 0.0),
    ]


def test_changed_weights_are_found_even_when_signed_anew(saved: Path) -> None:
    weights = load_file(saved / files.WEIGHTS)
    weights["head.weight"][0, 0] += 0.05
    save_file(weights, saved / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ZooError, match="not what was saved"):
        zoo.load(saved)
    resign(saved)
    assert [(check.name, check.passed) for check in zoo.verify(saved)] == [("hidden", True), ("logits", False)]


def test_the_caller_notices_nothing(tmp_path: Path) -> None:
    trained = model().train()
    before = torch.get_rng_state()
    zoo.save(trained, tmp_path / "art")
    zoo.load(tmp_path / "art")
    assert trained.training
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art"]
    assert stat.S_IMODE((tmp_path / "art").stat().st_mode) & 0o555 == 0o555


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    zoo.save(model().to(dtype), tmp_path / "art")
    loaded = zoo.load(tmp_path / "art").model
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(check.passed for check in zoo.verify(tmp_path / "art"))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose modules share a parameter: one copy in the file, one parameter after loading."""
    tied = _tied_class(monkeypatch)
    one = tied(HyenaDNAConfig(d_model=8, n_layer=1, max_len=40))
    zoo.save(one, tmp_path / "art")
    stored = load_file(tmp_path / "art" / files.WEIGHTS)
    assert "embed.weight" in stored
    assert "again.weight" not in stored
    two: Any = zoo.load(tmp_path / "art").model
    assert two.again.weight is two.embed.weight
    assert torch.equal(two.embed.weight, one.embed.weight)


def _tied_class(monkeypatch: pytest.MonkeyPatch) -> type[HyenaDNA]:
    import sys
    import types

    from zoo import catalogue

    class Tied(HyenaDNA):
        def __init__(self, config: HyenaDNAConfig) -> None:
            super().__init__(config)
            self.again = torch.nn.Embedding(*self.embed.weight.shape)
            self.again.weight = self.embed.weight

    module = types.ModuleType("tied_family")
    Tied.__module__ = "tied_family"
    vars(module).update(Tied=Tied, TiedConfig=HyenaDNAConfig)
    monkeypatch.setitem(sys.modules, "tied_family", module)
    monkeypatch.setitem(catalogue.MODELS, "tied", "tied_family:Tied")
    return Tied


def test_a_model_outside_the_catalogue_is_refused(tmp_path: Path) -> None:
    plain = torch.nn.Linear(2, 2)
    plain.config = HyenaDNAConfig()  # type: ignore[assignment]
    with pytest.raises(ZooError, match="Linear is not in the catalogue"):
        zoo.save(plain, tmp_path / "art")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.embed.weight[:] = float("nan")
    with pytest.raises(ZooError, match="not finite"):
        zoo.save(broken, tmp_path / "art")
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_nothing_is_overwritten_unless_asked(saved: Path, tmp_path: Path) -> None:
    before = (saved / files.WEIGHTS).read_bytes()
    with pytest.raises(ZooError, match="exists and is not empty"):
        zoo.save(model(), saved)
    assert (saved / files.WEIGHTS).read_bytes() == before
    zoo.save(model(d_model=16), saved, overwrite=True)
    assert zoo.load(saved).config.d_model == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("meow")
    with pytest.raises(ZooError, match="is not an artifact, so it is not overwritten"):
        zoo.save(model(), other, overwrite=True)
    assert (other / "cat.jpg").exists()


def test_a_failed_save_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.parity, "write", full)
    with pytest.raises(ZooError, match="No space"):
        zoo.save(model(d_model=16), saved, overwrite=True)
    assert zoo.load(saved).config.d_model == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art"]


def flip(file: Path, place: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def edit(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((place / files.CONFIG).read_text())
    change(content)
    files.write_json(place / files.CONFIG, content)
    resign(place)


def other_shape(place: Path) -> None:
    edit(place, lambda c: c["config"].update(d_model=16))


def without_weight(place: Path) -> None:
    weights = load_file(place / files.WEIGHTS)
    del weights["head.bias"]
    save_file(weights, place / files.WEIGHTS, metadata={"format": "pt"})
    resign(place)


def with_more_weights(place: Path) -> None:
    save_file({**load_file(place / files.WEIGHTS), "extra": torch.zeros(1)}, place / files.WEIGHTS, {"format": "pt"})
    resign(place)


def header_bomb(place: Path) -> None:
    (place / files.WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    resign(place)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: flip(p / files.WEIGHTS), "model.safetensors is not what was saved (its sha256 differs)"),
    (lambda p: flip(p / files.PARITY), "parity.safetensors is not what was saved"),
    (lambda p: os.truncate(p / files.WEIGHTS, 100), "has 100 bytes where"),
    (lambda p: (p / files.WEIGHTS).unlink(), "model.safetensors is missing"),
    (lambda p: (p / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    (lambda p: (p / files.FILES).unlink(), "it has no files.json"),
    (lambda p: (p / files.FILES).write_text("{"), "is not valid JSON"),
    (lambda p: (p / files.FILES).write_text("[]"), "holds a list"),
    (lambda p: (p / files.FILES).write_text('{"files": {}}'), "does not list config.json"),
    (lambda p: edit(p, lambda c: c.update(schema=99)), "has schema 99; this version of seqzoo reads schema 1"),
    (lambda p: edit(p, lambda c: c.update(modle="x")), "unknown key 'modle' (did you mean 'model'?)"),
    (lambda p: edit(p, lambda c: c.pop("config")), "missing key 'config'"),
    (lambda p: edit(p, lambda c: c.update(model="hyenadan")), "'hyenadan' (did you mean 'hyenadna'?)"),
    (
        lambda p: edit(p, lambda c: c["config"].update(n_layers=3)),
        "unknown key 'config.n_layers' (did you mean 'n_layer'?)",
    ),
    (lambda p: edit(p, lambda c: c["config"].update(d_model="8")), "config.d_model: value should be a valid integer"),
    (lambda p: edit(p, lambda c: c["config"].update(_target_="os.system")), "unknown key 'config._target_'"),
    (other_shape, "'embed.weight' is [16, 8], the config makes it [16, 16]"),
    (without_weight, "lacks 'head.bias'"),
    (with_more_weights, "holds 'extra'"),
    (header_bomb, "is damaged or no safetensors file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_damage_is_one_sentence(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved)
    with pytest.raises(ZooError) as caught:
        zoo.load(saved)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_in_the_listing_stay_inside(saved: Path) -> None:
    listing = json.loads((saved / files.FILES).read_text())
    listing["files"]["../outside"] = {"size": 1, "sha256": ""}
    files.write_json(saved / files.FILES, listing)
    with pytest.raises(ZooError, match="not the plain name of a file"):
        zoo.load(saved)


def test_the_card_may_be_edited(saved: Path) -> None:
    (saved / files.CARD).write_text("# my own words")
    (saved / "notes.txt").write_text("beside it")
    assert zoo.load(saved).classes
    (saved / files.CARD).unlink()
    assert zoo.load(saved).classes


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "hyenadna-tiny-1kk",
            "neither a folder, a Hub id (user/name) nor a model of the catalogue (did you mean 'hyenadna-tiny-1k'?)",
        ),
        ("hyenadna-tiny-1k", "the published weights of hyenadna-tiny-1k is not in the Hub cache"),
        ("nobody/nothing@v1", "hf download nobody/nothing --revision v1"),
        ("./no/folder/here", "neither a folder"),
    ],
)
def test_references_to_nothing(ref: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ZooError) as caught:
        zoo.load(ref)
    assert message in str(caught.value)


def test_a_file_is_not_an_artifact(saved: Path) -> None:
    with pytest.raises(ZooError, match="is a file, not an artifact folder"):
        zoo.load(saved / files.WEIGHTS)


def cache(root: Path, repo: str, source: Path, revision: str = "main") -> None:
    """Put a folder where huggingface_hub keeps a repository."""
    place = root / ("models--" + repo.replace("/", "--"))
    (place / "refs").mkdir(parents=True)
    (place / "refs" / revision).write_text("0" * 40)
    shutil.copytree(source, place / "snapshots" / ("0" * 40))


def test_a_hub_id_is_found_in_the_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    cache(tmp_path / "cache", "me/splice", saved, "v1")
    assert zoo.load("me/splice@v1").classes == ["a", "b", "c"]
    assert zoo.load("me/splice@" + "0" * 40).classes == ["a", "b", "c"]
    with pytest.raises(ZooError, match="not in the Hub cache"):
        zoo.load("me/splice@v2")


def test_official_weights_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the official layout at tiny size, under the name of a catalogue entry."""
    from zoo.convert import hyenadna

    official = tmp_path / "official"
    official.mkdir()
    original = model(d_model=16, n_layer=2, max_len=66)
    state = hyenadna.to_official(original.state_dict(), original.config)
    torch.save({"state_dict": {"model." + name: tensor for name, tensor in state.items()}}, official / "weights.ckpt")
    (official / "config.json").write_text(json.dumps(hyenadna.config_to_official(original.config)))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    cache(tmp_path / "cache", "LongSafari/hyenadna-tiny-1k-seqlen", official)
    loaded = zoo.load("hyenadna-tiny-1k")
    assert loaded.tokenizer is not None
    ids = torch.randint(7, 11, (2, 30))
    assert torch.allclose(loaded.model(ids), original.eval()(ids), atol=1e-6)


def test_convert_makes_an_artifact(tmp_path: Path) -> None:
    from zoo.cli.main import main
    from zoo.convert import hyenadna

    original = model(d_model=16, n_layer=2, max_len=66)
    state = hyenadna.to_official(original.state_dict(), original.config)
    torch.save({"state_dict": {"model." + name: tensor for name, tensor in state.items()}}, tmp_path / "weights.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(hyenadna.config_to_official(original.config)))
    assert main(["convert", str(tmp_path / "weights.ckpt"), "--out", str(tmp_path / "art")]) == 0
    loaded = zoo.load(tmp_path / "art")
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    assert loaded.tokenizer is not None
    assert all(check.passed for check in zoo.verify(tmp_path / "art"))
    assert main(["convert", str(tmp_path / "weights.ckpt"), "--out", str(tmp_path / "art")]) == 2


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zoo.hub.files.write_tensors", full)
    with pytest.raises(ZooError, match=r"cannot write '.*model': No space left on device"):
        artifact.save(model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
