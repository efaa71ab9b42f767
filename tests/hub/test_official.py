"""Official repositories by their own names: in their exact layouts at tiny size over HTTP, at full size by header."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import zoo
from tests.hub.hub_server import Hub
from zoo import catalogue
from zoo.config import from_dict, resolve
from zoo.convert.official import converter_module
from zoo.convert.parity import Case
from zoo.errors import ZooError
from zoo.hub import official
from zoo.hub.families import FAMILIES
from zoo.hub.headers import SIZES

CASES = Path(__file__).resolve().parents[1] / "parity" / "cases"
NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.bool": "BOOL"}


def pickle_of(value: Any) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def config_json(config: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({**{key: value for key, value in config.items() if key != "class"}, **more}).encode()


def safetensors_of(state: dict[str, Tensor]) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in state.items()}, {"format": "pt"})


def hyenadna_hf(case: Case) -> dict[str, bytes]:
    more = {"model_type": "hyenadna", "architectures": ["HyenaDNAForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_hyena.HyenaDNAForCausalLM"}}  # fmt: skip
    return {
        "config.json": config_json(case.config, **more),
        "model.safetensors": safetensors_of(case.state),
        "modeling_hyena.py": b"raise SystemExit('remote code ran')",
        "tokenizer_config.json": b'{"tokenizer_class": "HyenaDNATokenizer", "model_max_length": 1002}',
    }


def hyenadna_lightning(case: Case) -> dict[str, bytes]:
    state = {"model." + name: tensor for name, tensor in case.state.items()}
    checkpoint = {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 6e-4}, "pytorch-lightning_version": "1.8"}
    return {"config.json": config_json(case.config), "weights.ckpt": pickle_of(checkpoint)}


def dnabert2(case: Case) -> dict[str, bytes]:
    return {
        "config.json": config_json(case.config, auto_map={"AutoModel": "bert_layers.BertModel"}),
        "pytorch_model.bin": pickle_of(dict(case.state)),
        "bert_layers.py": b"raise SystemExit('remote code ran')",
        "flash_attn_triton.py": b"import triton",
    }


def llama(case: Case) -> dict[str, bytes]:
    more = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    return {"config.json": config_json(case.config, **more), "model.safetensors": safetensors_of(case.state)}


def llama_shards(case: Case) -> dict[str, bytes]:
    names = list(case.state)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    files = {file: safetensors_of({key: case.state[key] for key in keys}) for file, keys in parts.items()}
    more = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": config_json(case.config, **more)}  # fmt: skip


def mixin(case: Case) -> dict[str, bytes]:
    return {"config.json": config_json(case.config), "model.safetensors": safetensors_of(case.state)}


def diffusers(case: Case) -> dict[str, bytes]:
    name = "diffusion_pytorch_model.safetensors"
    return {"config.json": config_json(case.config), name: safetensors_of(case.state)}


def quantizer(case: Case) -> dict[str, bytes]:
    return {"seed_quantizer.pt": pickle_of(dict(case.state)), "README.md": b"SEED"}


def seed() -> SimpleNamespace:
    """The published names at widths that the released numbers of heads divide, which the file does not tell."""
    converter, target = converter_module(catalogue.CONVERTERS["seed"]), catalogue.MODELS["seed"]
    torch.manual_seed(0)
    tiny = FAMILIES["seed"].tiny
    fields = {**tiny, "decoder": {**tiny["decoder"], "mlp": {"kind": "gelu", "width": 4 * tiny["decoder"]["width"]}}}
    model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), fields))
    return SimpleNamespace(state=converter.to_official(model.state_dict(), model.config), config={})


def nbp(case: Case) -> dict[str, bytes]:
    """A Lightning checkpoint with the arguments of the training script."""
    arguments = argparse.Namespace(**{key: value for key, value in case.config.items() if key != "cls"})
    checkpoint = {"state_dict": dict(case.state), "hyper_parameters": {"args": arguments}, "global_step": 7}
    return {"ucf_base_nbp16_hybrid.ckpt" if arguments.hybrid else "k600_base_nbp16.ckpt": pickle_of(checkpoint)}


def llava(case: Case) -> dict[str, bytes]:
    """Shards, and one flat config whose tower is named elsewhere (its sizes stand here, since it is small)."""
    more = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "num_visual_tokens_max": 256,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}  # fmt: skip
    names = list(case.state)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    files = {file: safetensors_of({key: case.state[key] for key in keys}) for file, keys in parts.items()}
    config = {**case.config["llm"], "clip": case.config["clip"], **more}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode(), "config.json": config_json(config)}


REPOSITORIES = [
    ("LongSafari/hyenadna-small-32k-seqlen-hf", "hyenadna/dev-lm-hf", hyenadna_hf, False),
    ("LongSafari/hyenadna-tiny-1k-seqlen", "hyenadna/dev-lm-train-shift0", hyenadna_lightning, True),
    ("zhihan1996/DNABERT-2-117M", "dnabert2/dev-mlm", dnabert2, True),
    ("GenerTeam/GENERator-eukaryote-1.2b-base", "generator/dev-lm", llama, False),
    ("GenerTeam/GENERator-eukaryote-3b-base", "generator/dev-lm", llama_shards, False),
    ("metagene-ai/METAGENE-1", "metagene/dev-lm", llama_shards, False),
    ("yucornetto/tokenizer_titok_l32_imagenet", "titok/dev-stage2-legacy-l2", mixin, False),
    ("EPFL-VILAB/flextok_d18_d28_dfn", "flextok/dev-tiny", mixin, False),
    ("EPFL-VILAB/flextok_vae_c4", "flextok-vae/dev-tiny", diffusers, False),
    ("yucornetto/generator_titok_l32_imagenet", "titok-generator/dev-vit", mixin, False),
    ("AILab-CVC/seed-tokenizer-2", "seed", quantizer, True),
    ("ShuhuaiRen/NBP-ucf-base", "nbp/dev-hybrid-text", nbp, True),
    ("ShuhuaiRen/NBP-k600-base", "nbp/dev-block-uncond", nbp, True),
    ("gordonhu/MQT-LLaVA-7b", "mqt/dev-vlm", llava, False),
]
every = pytest.mark.parametrize(
    ("repo", "case", "layout", "pickled"), REPOSITORIES, ids=[row[0] for row in REPOSITORIES]
)


def check(model: torch.nn.Module, repo: str, case: Case) -> None:
    """The loaded weights, in official names again, are the case's, bit for bit."""
    entry = catalogue.ENTRIES[official.entry_of(repo)]
    converter = converter_module(catalogue.CONVERTERS[entry.model])
    layout = [converter.names_of(case.state)] if hasattr(converter, "names_of") else []
    back = converter.to_official(model.state_dict(), model.config, *layout)
    state = {name: tensor for name, tensor in case.state.items() if name in back}
    assert len(state) >= len(back)
    tied = {"lm_head.weight", "cls.predictions.decoder.weight"}
    assert set(case.state) - set(state) <= tied
    for name, tensor in state.items():
        assert torch.equal(back[name].to(tensor.dtype), tensor), name


@every
def test_an_official_repository_is_pulled_recognised_and_loaded(
    hub: Hub, repo: str, case: str, layout: Any, pickled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.cli.main import main

    given: Any = seed() if case == "seed" else Case(CASES / case)
    settle(given)
    hub.put(repo, layout(given))
    if pickled:
        with pytest.raises(ZooError, match=f"only as a pickle .*`zoo pull {repo} --allow-pickle`"):
            zoo.load(repo)
        assert main(["pull", repo]) == 2
        assert "--allow-pickle" in capsys.readouterr().err
    assert main(["pull", repo, *(["--allow-pickle"] if pickled else [])]) == 0
    shown = capsys.readouterr()
    entry = official.entry_of(repo)
    assert f"recognised  {catalogue.ENTRIES[entry].model}, " in shown.out
    assert f"all {len(given.state)} names and shapes fit" in shown.out
    assert f"differs from {entry}: " in shown.out, "this one is tiny, and the command says so"
    assert " ok\n" in shown.err
    found = zoo.load(repo, offline=True)
    check(found.model, repo, given)
    assert found.info["catalogue"] == entry
    assert not any(path.endswith(".py") for _, path in hub.requests if "/resolve/" in path)
    if catalogue.ENTRIES[entry].hub == repo:
        check(zoo.load(entry, offline=True).model, repo, given)


def settle(case: Case) -> None:
    """Tied entries of a published file are equal, while a case fills each name by itself."""
    for tied, source in (("lm_head.weight", "backbone.embeddings.word_embeddings.weight"),
                         ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")):  # fmt: skip
        if tied in case.state and source in case.state:
            case.state[tied] = case.state[source]


def test_official_weights_become_an_artifact(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli.main import main

    case = Case(CASES / "generator/dev-lm")
    hub.put("GenerTeam/GENERator-eukaryote-1.2b-base", llama(case))
    assert main(["pull", "generator-eukaryote-1.2b", "--out", str(tmp_path / "art")]) == 0
    assert all(check.passed for check in zoo.verify(tmp_path / "art"))
    found = zoo.load(tmp_path / "art")
    check(found.model, "GenerTeam/GENERator-eukaryote-1.2b-base", case)
    assert found.tokenizer.name == "kmer"
    assert main(["pull", "generator-eukaryote-1.2b", "--out", str(tmp_path / "art")]) == 2


def test_an_artifact_is_written_as_files_of_its_own(hub: Hub, saved: Path, tmp_path: Path) -> None:
    from zoo.cli.main import main

    hub.put("me/first", {path.name: path.read_bytes() for path in saved.iterdir()})
    assert main(["pull", "me/first", "--out", str(tmp_path / "copy")]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    zoo.load(tmp_path / "copy")


def test_weights_of_nobody_are_refused(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli.main import main

    hub.put("some/one", {"model.safetensors": safetensors_of({"conv1.weight": torch.ones(2)}), "config.json": b"{}"})
    assert main(["pull", "some/one"]) == 2
    assert "belong to no family" in capsys.readouterr().err


def test_a_changed_name_or_shape_is_refused(hub: Hub) -> None:
    case = Case(CASES / "generator/dev-lm")
    name = "model.layers.1.mlp.up_proj.weight"
    for spoiled in ({**case.state, name: torch.zeros(3, 3)}, {**case.state, "extra": torch.zeros(1)},
                    {key: value for key, value in case.state.items() if key != name}):  # fmt: skip
        files = {**llama(case), "model.safetensors": safetensors_of(spoiled)}
        hub.put("GenerTeam/GENERator-eukaryote-1.2b-base", files)
        for call in (lambda: official.recognise(pulled(), "x/y"), lambda: official.load(pulled(), "x/y")):
            with pytest.raises(ZooError):
                call()


def pulled() -> Path:
    from zoo.hub import client

    return client.pull("GenerTeam/GENERator-eukaryote-1.2b-base", update=True)


def test_several_models_in_one_repository_are_told_apart(hub: Hub) -> None:
    case = Case(CASES / "rar/dev")
    files = {f"rar_{size}.bin": pickle_of(dict(case.state)) for size in ("b", "l")}
    hub.put("yucornetto/RAR", {**files, "README.md": b"RAR"})
    with pytest.raises(ZooError, match="holds several models: name one of rar-b, rar-l, rar-xl, rar-xxl"):
        zoo.load("yucornetto/RAR")
    with pytest.raises(ZooError, match="only as a pickle"):
        zoo.load("rar-b")
    found = zoo.load("rar-b", allow_pickle=True)
    assert {path.name for path in found.path.iterdir()} == {"rar_b.bin", "README.md"}
    zoo.load("rar-l", allow_pickle=True)
    assert zoo.load("rar-b").path == found.path


# --- full size


def sparse(file: Path, manifest: dict[str, Any]) -> None:
    """A safetensors file of full size whose values take no room on the disk."""
    header, at = {}, 0
    for name, (shape, dtype) in manifest.items():
        size = SIZES[NAMES["torch." + dtype.removeprefix("torch.")]]
        for length in shape:
            size *= length
        header[name] = {"dtype": NAMES["torch." + dtype.removeprefix("torch.")], "shape": shape,
                        "data_offsets": [at, at + size]}  # fmt: skip
        at += size
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + at)


SYSTEMS = (
    "hyenadna", "dnabert2", "generator", "metagene", "flextok", "flextok-vae", "titok", "titok-generator",
)  # fmt: skip
FULL = sorted(path for system in SYSTEMS for path in (CASES / system / "released").glob("*.json"))


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_the_released_names_and_shapes_at_full_size(path: Path, tmp_path: Path) -> None:
    released = json.loads(path.read_text())
    repo = released["checkpoint"].split(",")[0].split(" ")[0]
    if not official.entry_of(repo):
        pytest.skip(f"{repo} is not in the catalogue")
    sparse(tmp_path / "model.safetensors", released["manifest"])
    if released.get("config"):
        (tmp_path / "config.json").write_text(json.dumps(released["config"]))
    found = official.recognise(tmp_path, repo)
    entry = catalogue.ENTRIES[found.entry]
    assert (found.family, found.difference) == (entry.model, "")
    assert found.tensors == len(released["manifest"])
    if repo == entry.hub:
        assert found.params == entry.params
