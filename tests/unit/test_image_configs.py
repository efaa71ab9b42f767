"""Configs of the image models: readable without torch, equal to the functions that spell the published shapes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from zoo import catalogue
from zoo.config import from_dict, resolve, to_dict
from zoo.models.flextok import FlexTokConfig, flextok_vit
from zoo.models.rar import RARConfig, rar_vit
from zoo.models.seed import SEEDConfig, decoder_vit, eva_vit

FAMILIES = ["flextok", "flextok_vae", "maskgit", "maskgit_vqgan", "rar", "seed", "titok"]
SCRIPT = """
import json, sys
from zoo import catalogue
from zoo.config import from_dict, schema, to_dict
out = {}
for family in sys.argv[1:]:
    cls = schema(catalogue.schema_target(catalogue.MODELS[family]))
    out[family] = to_dict(from_dict(cls, {}))
assert "torch" not in sys.modules
print(json.dumps(out))
"""


def test_schemas_need_no_torch_and_give_the_real_defaults() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *FAMILIES], capture_output=True, text=True, check=True)
    light = json.loads(done.stdout)
    for family in FAMILIES:
        real = resolve(catalogue.schema_target(catalogue.MODELS[family]))
        assert light[family] == json.loads(json.dumps(to_dict(real()))), family


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_survive_json(family: str) -> None:
    real = resolve(catalogue.schema_target(catalogue.MODELS[family]))
    assert from_dict(real, json.loads(json.dumps(to_dict(real())))) == real()


def test_default_shapes_are_the_published_ones() -> None:
    assert FlexTokConfig().encoder == flextok_vit(768, 12)
    assert FlexTokConfig().decoder == flextok_vit(768, 12, adaln=True)
    assert RARConfig().vit == rar_vit(768, 24, 16, 3072)
    assert SEEDConfig().vit == eva_vit()
    assert SEEDConfig().decoder == decoder_vit()
