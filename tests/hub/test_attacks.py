"""Repositories and folders made by an attacker: nothing runs, nothing is written elsewhere, memory stays as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import zoo
from tests.hub.hub_server import Hub
from tests.hub.test_official import CASES, config_json, llama, mixin, pickle_of, safetensors_of
from zoo.convert.official import open_official
from zoo.convert.parity import Case
from zoo.errors import ZooError
from zoo.hub import client, files, names, official
from zoo.hub.headers import read_header

WITNESS = "ZOO_TEST_WITNESS"
GENERATOR = "GenerTeam/GENERator-eukaryote-1.2b-base"


class Evil:
    def __reduce__(self) -> Any:
        return exec, (f"import os; os.environ['{WITNESS}'] = '1'",)


@pytest.fixture(autouse=True)
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No code of a repository ran, and the process did not take another gigabyte."""
    monkeypatch.delenv(WITNESS, raising=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert WITNESS not in os.environ
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def relisted(place: Path) -> None:
    """The attacker also writes files.json."""
    files.write_json(place / files.FILES, {"schema": 1, "files": files.listing(place)})


def test_an_evil_pickle_beside_and_instead_of_weights(hub: Hub, saved: Path) -> None:
    evil = pickle_of({"state_dict": {"w": torch.ones(1)}, "x": Evil()})
    hub.put("me/first", {**{p.name: p.read_bytes() for p in saved.iterdir()}, "pytorch_model.bin": evil})
    zoo.load("me/first", allow_pickle=True)
    for name in ("pytorch_model.bin", "weights.ckpt"):
        hub.put("zhihan1996/DNABERT-2-117M", {"config.json": b"{}", name: evil})
        with pytest.raises(ZooError, match="only as a pickle"):
            zoo.load("zhihan1996/DNABERT-2-117M")
        with pytest.raises(ZooError, match=r"Python objects \('exec'\).*not opened"):
            zoo.load("zhihan1996/DNABERT-2-117M", allow_pickle=True)
        shutil.rmtree(os.environ["HF_HUB_CACHE"])


def test_a_pickle_under_the_name_of_safetensors(hub: Hub) -> None:
    hub.put(GENERATOR, {"config.json": b"{}", "model.safetensors": pickle_of({"x": Evil()})})
    with pytest.raises(ZooError, match="damaged or no safetensors file"):
        zoo.load(GENERATOR)


def test_dotted_paths_in_an_official_config_are_words(hub: Hub) -> None:
    case = Case(CASES / "flextok/dev-tiny")
    evil = json.loads(json.dumps(case.config).replace("flextok.model.utils.dict_ops.PerSampleOp", "os.putenv"))
    evil["regularizer"]["_target_"] = "builtins.exec"
    evil["regularizer"]["source"] = f"import os; os.environ['{WITNESS}'] = '1'"
    hub.put("EPFL-VILAB/flextok_d18_d28_dfn", {**mixin(case), "config.json": config_json(evil)})
    with contextlib.suppress(ZooError):
        zoo.load("EPFL-VILAB/flextok_d18_d28_dfn")


@pytest.mark.parametrize("text", [
    "_target_: os.system\ncommand: exit 1\n",
    "model: {_target_: builtins.exec, _args_: ['import os']}\n",
    "model: !!python/object/apply:os.system ['exit 1']\n",
    "hydra: {run: {dir: /tmp/elsewhere}}\n",
])  # fmt: skip
def test_a_recipe_from_a_repository_is_data(saved: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli.main import main

    (saved / "recipe.yaml").write_text(text)
    relisted(saved)
    assert main(["validate", str(saved / "recipe.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    found = zoo.load(saved)
    if "!!python" in text:
        with pytest.raises(ZooError, match=r"recipe\.yaml"):
            _ = found.recipe
    else:
        assert isinstance(found.recipe, dict)


BAD_PATHS = ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "a\\b.json", "C:evil.json",
             "con\x00fig.json", "line\nbreak.json", ".", "..", "", "a//b.json", " lead.json",
             "nul\x7f.json"]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_leads_out_is_never_written(hub: Hub, saved: Path, tmp_path: Path, path: str) -> None:
    hub.put("me/first", {**{p.name: p.read_bytes() for p in saved.iterdir()}, path: b"{}"})
    before = {str(found) for found in tmp_path.rglob("*") if "cache" not in found.parts}
    with pytest.raises(ZooError, match="no plain path") as caught:
        client.pull("me/first")
    assert "\n" not in str(caught.value)
    assert {str(found) for found in tmp_path.rglob("*") if "cache" not in found.parts} == before
    assert not any("/resolve/" in asked for _, asked in hub.requests)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/b", "..", "x\\y"])
def test_files_json_cannot_name_other_places(saved: Path, name: str) -> None:
    listing = json.loads((saved / "files.json").read_text())
    listing["files"][name] = {"size": 1, "sha256": "0" * 64}
    (saved / "files.json").write_text(json.dumps(listing))
    with pytest.raises(ZooError, match="not the plain name of a file"):
        zoo.load(saved)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a\\b", 7, None, ["x"]])
def test_an_index_cannot_name_other_places(tmp_path: Path, name: Any) -> None:
    place = tmp_path / "repo"
    place.mkdir()
    (tmp_path / "other.safetensors").write_bytes(save({"w": torch.ones(1)}))
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    for call in (open_official, official.recognise):
        with pytest.raises(ZooError, match="plain"):
            call(place)


def test_links_out_of_an_artifact_are_not_followed(saved: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("password")
    (saved / "metrics.csv").symlink_to(secret)
    relisted(saved)
    with pytest.raises(ZooError, match="link that leads out"):
        zoo.load(saved)
    with pytest.raises(ZooError, match="link that leads out"):
        client.push(saved, "me/first")
    (saved / "metrics.csv").unlink()
    (saved / "metrics.csv").symlink_to("config.json")
    relisted(saved)
    zoo.load(saved)
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to(secret)
    with pytest.raises(ZooError, match="link that leads out"):
        files.published_files(saved)


@pytest.mark.parametrize("ref", ["../../etc", "a/b/c", "me/..", "me/x@../../y", "me/x@/abs", "me/x@a..b", "me/x@",
                                 "me/a--b", "me/x y", "-me/x", "me/x@-rf", "me/\u202ex"])  # fmt: skip
def test_references_are_names(hub: Hub, ref: str) -> None:
    with pytest.raises(ZooError) as caught:
        zoo.load(ref)
    assert "\n" not in str(caught.value)
    assert not hub.requests


# --- safetensors


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "a header of 2**60 bytes": header({}, length=2**60),
    "a header as long as 10 GB": header({}, length=10 * 2**30),
    "a tensor of 10 GB in a small file": header({"w": entry([2_684_354_560], 0, 10 * 2**30)}),
    "a shape whose product overflows": header({"w": entry([2**40, 2**40], 0, 0)}),
    "a shape beyond its place": header({"w": entry([1000], 0, 4)}, b"1234"),
    "offsets beyond the file": header({"w": entry([1], 4, 8)}, b"1234"),
    "offsets the wrong way round": header({"w": entry([1], 4, 0)}, b"1234"),
    "tensors that overlap": header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
    "a hole": header({"w": entry([1], 0, 4)}, b"12345678"),
    "a negative length": header({"w": entry([-1], 0, 4)}, b"1234"),
    "a length that is a word": header({"w": entry(["1"], 0, 4)}, b"1234"),
    "a length that is true": header({"w": entry([True], 0, 4)}, b"1234"),
    "an unknown dtype": header({"w": entry([1], 0, 4, "F31")}, b"1234"),
    "a list of dtypes": header({"w": entry([1], 0, 4, ["F32"])}, b"1234"),
    "an entry that is a number": header({"w": 3}),
    "a list": struct.pack("<Q", 2) + b"[]",
    "a name twice": struct.pack("<Q", 118) + (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
                                              b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}').ljust(118),
    "deep nesting": struct.pack("<Q", 400_000) + b'{"a":' * 80_000,
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe\x00{",
    "three bytes": b"abc",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_is_weighed_before_anything_is_built(saved: Path, tmp_path: Path, what: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[what])
    with pytest.raises(ZooError, match="damaged or no safetensors file"):
        read_header(file)
    (saved / "model.safetensors").write_bytes(HEADERS[what])
    relisted(saved)
    with pytest.raises(ZooError):
        zoo.load(saved)
    with pytest.raises(ZooError):
        official.recognise(tmp_path)


def test_the_header_reader_agrees_with_the_library(saved: Path) -> None:
    from safetensors import safe_open

    with safe_open(saved / "model.safetensors", "pt") as stored:
        wanted = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    assert {name: shape for name, (_, shape) in read_header(saved / "model.safetensors").items()} == wanted


# --- configs


def with_config(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    described = json.loads((saved / "config.json").read_text())
    change(described)
    (saved / "config.json").write_text(json.dumps(described))
    relisted(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": "16"}, {"d_model": 1.5}, {"d_model": None}, {"d_model": [16]}, {"hyena": 3}, {"head": "lm"},
        {"d_model": -16}, {"d_model": 0}, {"n_layer": -1}, {"_target_": "os.system"}, {"mixer": "os:system"},
        {"mixer": "zoo.nn.hyena:Hyena"}, {"d_model": 2**40}, {"n_layer": 10**9},
        {"vocab_size": 10**12},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_wrong_values_or_for_a_giant_is_one_sentence(saved: Path, change: dict[str, Any]) -> None:
    with_config(saved, lambda described: described["config"].update(change))
    with pytest.raises(ZooError) as caught:
        zoo.load(saved)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value) or "these are not the weights" in str(caught.value)


@pytest.mark.parametrize("length", [2**62, 10**13])
def test_a_context_that_no_machine_has_takes_no_memory(saved: Path, length: int) -> None:
    with_config(saved, lambda described: described["config"].update(max_len=length))
    with contextlib.suppress(ZooError):
        assert zoo.load(saved).model.max_len == length


@pytest.mark.parametrize(
    "change", [{"model": "os:system"}, {"model": ["hyenadna"]}, {"model": "../x"}, {"config": []}, {"tokenizer": 5},
               {"outputs": []}, {"schema": 99}, {"auto_map": {}}], ids=str,
)  # fmt: skip
def test_a_description_of_wrong_kinds(saved: Path, change: dict[str, Any]) -> None:
    with_config(saved, lambda described: described.update(change))
    with pytest.raises(ZooError):
        zoo.load(saved)


@pytest.mark.parametrize("raw", [b"[" * 200_000, b"not json", b"\xff\xfe", b"[]", b"3", b"", b'{"schema": NaN}'])
def test_a_config_that_is_no_object(saved: Path, raw: bytes) -> None:
    (saved / "config.json").write_bytes(raw)
    relisted(saved)
    with pytest.raises(ZooError):
        zoo.load(saved)


@pytest.mark.parametrize(
    "section",
    [
        {"name": "os:system"}, {"name": "bpe", "file": "../../secret.json"}, {"name": "bpe", "file": "/etc/hostname"},
        {"name": "char", "_target_": "os.system"}, {"name": 3}, ["char"], {"name": "bpe", "file": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_of_an_attacker(saved: Path, tmp_path: Path, section: Any) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (saved / "tokenizer_config.json").write_text(json.dumps(section))
    relisted(saved)
    with pytest.raises(ZooError):
        zoo.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": "x"}, {"rope_theta": []},
        {"vocab_size": -1}, {"num_hidden_layers": 10**9}, {"hidden_size": 2**40}, {"rope_scaling": "yarn"},
        {"architectures": 5}, {"num_key_value_heads": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_official_config_of_wrong_values(hub: Hub, change: dict[str, Any]) -> None:
    case = Case(CASES / "generator/dev-lm")
    hub.put(GENERATOR, {**llama(case), "config.json": config_json({**case.config, **change})})
    for call in (lambda: zoo.load(GENERATOR), lambda: official.recognise(client.pull(GENERATOR))):
        with pytest.raises(ZooError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [{}, [], {"tolerance": "os.system"}, {"tolerance": '{"atol": 1e400}'}])
def test_a_parity_file_of_an_attacker(saved: Path, header: Any) -> None:
    from safetensors.torch import save_file

    save_file({"input.os.system": torch.ones(1), "output.x": torch.ones(1)}, saved / "parity.safetensors",
              {"format": "pt", **dict(header)})  # fmt: skip
    relisted(saved)
    try:
        failed = [check for check in zoo.verify(saved) if not check.passed]
        assert failed
    except ZooError:
        pass


def test_the_listing_proves_nothing_against_a_hub_that_lies(hub: Hub, saved: Path) -> None:
    """What the Hub announces and what files.json lists must both hold."""
    contents = {path.name: path.read_bytes() for path in saved.iterdir()}
    data = contents["model.safetensors"]
    contents["model.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    hub.put("me/first", contents)
    place = client.pull("me/first")
    announced = hub.repos["me/first"].commits[place.name]["model.safetensors"].sha256
    assert hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest() == announced
    with pytest.raises(ZooError, match="is not what was saved"):
        zoo.load("me/first")


@pytest.mark.parametrize(
    ("paths", "file", "pickles", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "m.py"], "", True,
         ["config.json", "model.safetensors"]),
        (["config.json", "pytorch_model.bin", "optimizer.bin", "training_args.bin"], "", False, ["config.json"]),
        (["config.json", "pytorch_model.bin", "optimizer.bin"], "", True, ["config.json", "pytorch_model.bin"]),
        (["a.pt", "b.pt", "LICENSE"], "b.pt", True, ["LICENSE", "b.pt"]),
        (["a.pt", "b.pt", "LICENSE"], "b.pt", False, ["LICENSE"]),
        (["x/m.safetensors", "x/config.json", "y/config.json"], "x/m.safetensors", False,
         ["x/config.json", "x/m.safetensors"]),
        (["data.pkl", "run.exe", "x.ipynb", "hubconf.py"], "", True, []),
    ],
)  # fmt: skip
def test_which_files_are_chosen(paths: list[str], file: str, pickles: bool, wanted: list[str]) -> None:
    assert names.choose(paths, file, pickles) == wanted


def test_a_safetensors_artifact_opens_with_the_plain_library(saved: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(saved / "model.safetensors")
    model = zoo.load(saved).model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert safetensors_of(state)
