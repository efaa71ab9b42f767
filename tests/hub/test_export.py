"""Export: official layouts against the released manifests, transformers on the same ids, programs on the same input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from tests.hub.test_official import CASES
from zoo import catalogue, tokenizers
from zoo.cli.main import main
from zoo.config import from_dict, resolve
from zoo.convert import dnabert2
from zoo.errors import ZooError
from zoo.hub.artifact import Artifact
from zoo.hub.export import export
from zoo.hub.families import FAMILIES
from zoo.nn.heads import HeadConfig


def tiny(family: str, **changes: Any) -> torch.nn.Module:
    target = catalogue.MODELS[family]
    torch.manual_seed(0)
    config = from_dict(resolve(catalogue.schema_target(target)), {**FAMILIES[family].tiny, **changes})
    return resolve(target)(config).eval()


def exported(model: torch.nn.Module, form: str, out: Path, **more: Any) -> list[str]:
    return export(Artifact(model, None, out, {}), form, out, **more)


@pytest.mark.parametrize(
    ("family", "released"),
    [
        ("dnabert2", "dnabert2/released/zhihan1996__DNABERT-2-117M.json"),
        ("generator", "generator/released/GenerTeam__GENERator-eukaryote-1.2b-base.json"),
        ("metagene", "metagene/released/metagene-ai__METAGENE-1.json"),
    ],
)
def test_the_official_layout_has_the_released_names_and_config_keys(tmp_path: Path, family: str, released: str) -> None:
    manifest = json.loads((CASES / released).read_text())
    model = tiny(family)
    lines = exported(model, "official", tmp_path / "out")
    assert "converted back bit for bit" in lines[0]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    first = lambda names: {
        name for name in names if not any(f".{i}." in name for i in range(2, 99))
    }  # tiny has two layers
    assert first(manifest["manifest"]) == set(stored)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    bookkeeping = {"_name_or_path", "architectures", "auto_map", "gradient_checkpointing", "torch_dtype", "use_cache",
                   "transformers_version", "attention_dropout", "pretraining_tp", "model_type"}  # fmt: skip
    assert set(manifest["config"]) - bookkeeping <= set(config)


@pytest.mark.parametrize("family", ["generator", "metagene"])
def test_transformers_loads_it_and_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(family)
    lines = exported(model, "transformers", tmp_path / "out")
    assert any(line.startswith("LlamaForCausalLM  loads it") for line in lines)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = torch.randint(0, model.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_a_classifier_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    head = {"kind": "sequence", "num_outputs": 3, "pooling": "last", "bias": False}
    model = tiny("generator", head=head)
    exported(model, "transformers", tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(32, 64, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ZooError, match=r"train it with head\.bias=false"):
        exported(tiny("generator", head={**head, "bias": True}), "transformers", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_comparison_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    module = __import__("zoo.convert.generator", fromlist=["x"])
    right = module.config_to_official
    monkeypatch.setattr(module, "config_to_official", lambda config: {**right(config), "rope_theta": 100.0})
    monkeypatch.setattr("zoo.hub.export._check_config", lambda config, ours: None)
    with pytest.raises(ZooError, match="LlamaForCausalLM differs from the model"):
        exported(tiny("generator"), "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no class for DNABERT-2.*--format official"):
        exported(tiny("dnabert2"), "transformers", tmp_path / "a")
    with pytest.raises(ZooError, match="no class for hyenadna models"):
        exported(tiny("hyenadna"), "transformers", tmp_path / "b")


def test_official_hyenadna_reads_back(tmp_path: Path) -> None:
    from zoo.convert.official import convert_file

    model = tiny("hyenadna")
    exported(model, "official", tmp_path / "out")
    family, config, weights = convert_file(tmp_path / "out")
    assert family == "hyenadna"
    assert config.max_len == model.config.max_len
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_model_of_no_official_layout(tmp_path: Path) -> None:
    from zoo.models.lm import LM, LMConfig

    model = LM(LMConfig(d_model=16, n_layer=1, vocab_size=12, mixer="titans"))
    with pytest.raises(ZooError, match="no official layout"):
        exported(model.eval(), "official", tmp_path / "out")


@pytest.mark.parametrize("family", ["generator", "dnabert2", "hyenadna", "titok"])
def test_a_program_of_torch_export_gives_the_same_outputs(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    lines = exported(model, "torch", tmp_path / "out")
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    if family == "titok":
        assert "inputs of exactly [1, 3, 16, 16]" in lines[0]
        return
    length = 66 if family == "hyenadna" else 128
    ids = torch.randint(*FAMILIES[family].ids, (5, length))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids)[0], model(ids), atol=1e-5, rtol=1e-5)
    assert ("`import zoo.nn" in " ".join(lines)) == (family == "hyenadna")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["generator", "titok"])
def test_onnx_runtime_gives_the_same_outputs(tmp_path: Path, family: str) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(family)
    length = {} if family == "titok" else {"length": 40}
    lines = exported(model, "onnx", tmp_path / "out", **length)
    assert "ONNX Runtime gives the same outputs" in lines[0]
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    if family != "titok":
        batch = session.get_inputs()[0].shape[0]  # a number where the exporter could not leave the batch open
        ids = torch.randint(32, 64, (batch if isinstance(batch, int) else 3, 40))
        found = torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_what_onnx_cannot_say_is_one_sentence(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    with pytest.raises(ZooError, match="ONNX cannot say what this hyenadna model computes") as caught:
        exported(tiny("hyenadna"), "onnx", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install 'seqzoo\[onnx\]'"):
        exported(tiny("generator"), "onnx", tmp_path / "out")


def test_a_length_beyond_the_model(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="--length 67 is more than the 66 tokens"):
        exported(tiny("hyenadna"), "torch", tmp_path / "out", length=67)


def test_the_command_with_a_vocabulary(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(shared.glob("goldens/dnabert2/**/tokenizer.json"), None)
    if file is None:
        pytest.skip("no vocabulary of DNABERT-2 here")
    tokenizer = tokenizers.from_catalogue("dnabert2-bpe", file=str(file))
    model = tiny("dnabert2", vocab_size=4096)
    place = zoo.save(model, tmp_path / "art", tokenizer=tokenizer)
    assert main(["export", str(place), "--format", "official", "--out", str(tmp_path / "out")]) == 0
    assert "tokenizer.json     the vocabulary" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert main(["export", str(place), "--format", "official", "--out", str(tmp_path / "out")]) == 2
    state = load_file(tmp_path / "out" / "model.safetensors")
    again = dnabert2.to_zoo(state, model.config)
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items() if name in again)


def test_heads_of_dnabert2(tmp_path: Path) -> None:
    head = HeadConfig(kind="sequence", num_outputs=2, pooling="first")
    lines = exported(tiny("dnabert2", head={"kind": "sequence", "num_outputs": 2, "pooling": "first"}), "official",
                     tmp_path / "out")  # fmt: skip
    assert head.kind in ("sequence",)
    assert lines[1].startswith("config.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_labels"] == 2
