"""A recipe that trains in a second, and the command called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import zoo.hub.artifact as artifact
from zoo import catalogue
from zoo.cli.main import main
from zoo.config import from_dict, resolve
from zoo.hub.families import FAMILIES
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.generator import GENERator, GENERatorConfig
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.tokenizers import build

TINY = """
defaults:
  - /datamodules@data: uci_splice
  - /tokenizers@tokenizer: dna-char/tokenizer
  - _self_
description: a test
model:
  {name: hyenadna, d_model: 8, n_layer: 1, max_len: 64, hyena: {filter_width: 8},
   head: {kind: sequence, num_outputs: 3}}
data: {batch_size: 64, limit: 256}
task: {name: classify, optim: {lr: 3.0e-3}}
trainer: {max_steps: 4, val_every: 4, log_every: 1, monitor: val/mcc, mode: max, threads: 1, accelerator: cpu}
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def zoo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`zoo("list", "--json")` -> status, stdout, stderr."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; tests read it and never write there."""
    place = tmp_path_factory.mktemp("trained")
    file = place / "tiny.yaml"
    file.write_text(TINY, encoding="utf-8")
    assert main(["train", str(file), "--out", str(place / "run")]) == 0
    return place / "run"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small untrained models: letters left to right, 3-mers left to right, masked letters, two classes of letters."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    letters = build({"name": "char"})
    kmers = build({"name": "kmer", "k": 3, "align": "left"})
    hyena = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=130))
    decoder = GENERator(
        GENERatorConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=1, d_inner=32, vocab_size=kmers.vocab_size)
    )
    encoder = DNABERT2(DNABERT2Config(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=letters.vocab_size))
    classifier = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=130))
    classifier.reset_head(2)
    made = {
        "letters": (hyena, letters), "kmers": (decoder, kmers), "masked": (encoder, letters),
        "classes": (classifier, letters),
    }  # fmt: skip
    for name, (model, tokenizer) in made.items():
        with torch.no_grad():  # initial weights are so small that all scores would be alike
            for parameter in model.parameters():
                parameter.mul_(8) if parameter.dim() > 1 else None
        outputs = {"classes": ["no", "yes"], "task_kind": "multiclass"} if name == "classes" else {}
        artifact.save(model, place / name, tokenizer=tokenizer, **outputs)
    return {name: place / name for name in made}


def small(family: str, **changes: Any) -> torch.nn.Module:
    target = catalogue.MODELS[family]
    torch.manual_seed(0)
    config = from_dict(resolve(catalogue.schema_target(target)), {**FAMILIES[family].tiny, **changes})
    return resolve(target)(config).eval()


@pytest.fixture(scope="session")
def visual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny artifacts of pictures, clips and questions."""
    place = tmp_path_factory.mktemp("visual")
    made: dict[str, Path] = {}
    for family in ("titok", "flextok", "flextok_vae", "seed", "nbp_tokenizer"):
        more = {"preprocess": {"size": 16}} if family == "flextok_vae" else {}
        model = small(family, **more)
        with torch.no_grad():  # gates that begin at zero would hide the tokens from the decoder
            for parameter in model.parameters() if family == "flextok" else ():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[family] = artifact.save(model, place / family)
    tokens = {"visual_tokenizer": str(made["titok"]), "classes": ["cat", "dog", "owl"]}
    generator = small("maskgit", codes=16, length=4)
    made["maskgit"] = artifact.save(generator, place / "maskgit", run={"data": tokens})
    made["rar"] = artifact.save(small("rar", codes=16, length=4), place / "rar", run={"data": tokens})
    clips = {"video_vocab": 64000, "grid": [2, 2, 2]}
    made["nbp"] = artifact.save(
        small("nbp", **clips), place / "nbp", run={"data": {"visual_tokenizer": str(made["nbp_tokenizer"])}}
    )
    made["nbp_class"] = artifact.save(
        small("nbp", **clips, hybrid=True, cond_vocab=2, cond_tokens=1), place / "nbp_class",
        run={"data": {"visual_tokenizer": str(made["nbp_tokenizer"]), "classes": ["walk", "run"]}},
    )  # fmt: skip
    words = build({"name": "word", "words": ["?", "what", "color", "is", "it", "red", "blue"]})
    decoder = {**FAMILIES["mqt"].tiny["lm"], "vocab_size": words.vocab_size}
    made["mqt"] = artifact.save(small("mqt", lm=decoder), place / "mqt", tokenizer=words)
    return made
