"""Image models as artifacts: saved, verified, loaded again with the same outputs; official pickles converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import catalogue
from zoo.config import from_dict, resolve
from zoo.convert.official import convert_file
from zoo.convert.parity import Case
from zoo.hub import artifact

VIT = {"width": 32, "layers": 2, "heads": 4, "mlp": {"kind": "gelu", "width": 64}}
STACK = {"widths": [16, 32], "blocks": 1, "decoder_blocks": 2, "z_channels": 4, "groups": 8, "mid_attention": True}
FLEX = {**VIT, "mlp": {"kind": "swiglu", "width": 48, "bias": False}, "qkv_bias": "none", "out_bias": False}
TINY: dict[str, dict[str, Any]] = {
    "titok": {
        "encoder": VIT, "decoder": VIT, "encoder_patch": 8, "decoder_patch": 8, "latents": 4,
        "quantizer": {"size": 16, "dim": 6}, "preprocess": {"size": 16}, "text_length": 3, "text_width": 5,
    },
    "maskgit_vqgan": {
        "stack": {"widths": [32, 64], "z_channels": 8, "bias": False, "shortcut": "output"},
        "quantizer": {"size": 16, "dim": 8}, "preprocess": {"size": 16},
    },
    "flextok_vae": {"stack": STACK, "preprocess": {"size": 16}},
    "flextok": {
        "vae": {"stack": STACK, "preprocess": {"size": 16}}, "channels": 4, "latent_size": 8, "registers": 4,
        "encoder": FLEX, "decoder": {**FLEX, "adaln": True, "adaln_groups": 2}, "preprocess": {"size": 16},
    },
    "seed": {
        "vit": {**VIT, "qkv_bias": "qv"}, "patch": 7, "embed_width": 6, "decoder": {**VIT, "width": 24},
        "qformer": {"width": 24, "encoder_width": 32, "layers": 2, "heads": 4, "inner": 32, "queries": 4},
        "quantizer": {"size": 16, "dim": 6}, "preprocess": {"size": 14},
    },
    "maskgit": {"codes": 12, "classes": 3, "length": 6, "vit": {**VIT, "prenorm": False}},
    "rar": {"codes": 12, "classes": 3, "length": 6, "vit": {**VIT, "qk_norm": "affine", "adaln": True}},
}  # fmt: skip
CASES = Path(__file__).parent.parent / "parity" / "cases"
PICKLES = {"maskgit-vqgan/dev-rect": "maskgit_vqgan", "rar/dev": "rar", "titok/dev-stage2-legacy-l2": "titok"}


@pytest.mark.parametrize("family", sorted(TINY))
def test_saved_models_come_back_and_verify(family: str, tmp_path: Path) -> None:
    target = catalogue.MODELS[family]
    model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), TINY[family], family)).eval()
    place = artifact.save(model, tmp_path / family)
    checks = artifact.verify(place)
    assert checks
    assert all(check.passed for check in checks)
    loaded = artifact.load(place).model
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("family", sorted(TINY))
def test_bfloat16_autocast_trains_with_finite_gradients(family: str) -> None:
    target = catalogue.MODELS[family]
    model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), TINY[family], family)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(**model.example_inputs())
    output = result if isinstance(result, torch.Tensor) else result.output
    loss = output.float().square().mean() + (0 if isinstance(result, torch.Tensor) else result.loss.float())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("family", sorted(TINY))
def test_bfloat16_weights_run(family: str) -> None:
    target = catalogue.MODELS[family]
    model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), TINY[family], family)).eval().bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.example_inputs().items()}
    with torch.no_grad():
        result = model(**inputs)
    assert torch.isfinite(result if isinstance(result, torch.Tensor) else result.output).all()


@pytest.mark.parametrize("case", sorted(PICKLES))
def test_official_pickles_without_a_config_convert(case: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save(Case(CASES / case).state, file)
    family, config, weights = convert_file(file)
    assert family == PICKLES[case]
    with torch.device("meta"):
        model = resolve(catalogue.MODELS[family])(config)
    assert set(weights) == set(model.state_dict())
