"""The catalogue: literal tables from the short names that recipes, cards and the Hub use to the classes behind them.

Nothing registers itself and nothing here imports what it names. To add a model: one line in MODELS, one in ENTRIES
for each published size, and one in CONVERTERS and REPLAYS if official weights exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError, nearest

MODELS = {
    "flextok_vae": "zoo.models.flextok_vae:FlexTokVAE",
    "maskgit_vqgan": "zoo.models.maskgit_vqgan:MaskGITVQGAN",
    "hyenadna": "zoo.models.hyenadna:HyenaDNA",
}

MIXERS = {
    "hyena": "zoo.nn.hyena:Hyena",
    "lssl": "zoo.nn.s4:LSSL",
    "s4": "zoo.nn.s4:S4",
    "s4d": "zoo.nn.s4:S4D",
}

TOKENIZERS = {
    "char": "zoo.tokenizers.char:CharTokenizer",
    "kmer": "zoo.tokenizers.kmer:KmerTokenizer",
    "bpe": "zoo.tokenizers.bpe:BpeTokenizer",
}

DATAMODULES = {
    "genome": "zoo.datamodules.genome:GenomeData",
    "labelled": "zoo.datamodules.labelled:LabelledData",
}

TASKS = {
    "causal_lm": "zoo.tasks.causal_lm:CausalLM",
    "classify": "zoo.tasks.classify:Classify",
}

# official weights and configs <-> ours: module with to_zoo, to_official, config_from_official
CONVERTERS = {
    "flextok_vae": "zoo.convert.flextok_vae",
    "maskgit_vqgan": "zoo.convert.maskgit_vqgan",
    "hyenadna": "zoo.convert.hyenadna",
    "s4": "zoo.convert.s4",
}

# parity cases: system -> function that runs a case
REPLAYS = {
    "hyena": "zoo.convert.hyenadna_parity:replay_hyena",
    "lfq": "zoo.convert.quantizers:replay_lfq",
    "flextok-vae": "zoo.convert.flextok_vae:replay",
    "maskgit-vqgan": "zoo.convert.maskgit_vqgan:replay",
    "lpips": "zoo.convert.image_losses:replay_lpips",
    "rfid": "zoo.convert.image_losses:replay_rfid",
    "titok-discriminator": "zoo.convert.image_losses:replay_discriminator",
    "vq": "zoo.convert.quantizers:replay_vq",
    "hyenadna": "zoo.convert.hyenadna_parity:replay",
    "s4": "zoo.convert.s4:replay",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A published model of the catalogue.

    Attributes:
        model: family, a key of MODELS.
        hub: id of the official repository.
        config: what its config differs in from the family's defaults.
        params: trainable parameters.
        context: longest input in tokens.
        vocab: rows of the vocabulary that mean something.
        tokenizer: folder of tokenizers/ that goes with it.
        licence: of the weights, as their publisher states it.
        tasks: what it is used for.
    """

    model: str
    hub: str
    config: dict[str, Any] = field(default_factory=dict)
    params: int
    context: int
    vocab: int
    tokenizer: str
    licence: str
    tasks: tuple[str, ...] = ()


ENTRIES: dict[str, Entry] = {}


def lookup(table: dict[str, Any], name: str, what: str) -> Any:
    """The value of *name* in *table*.

    Raises:
        ConfigError: unknown name, with the nearest known one; *what* says what kind of thing was looked for.
    """
    try:
        return table[name]
    except KeyError:
        raise ConfigError(f"unknown {what} '{name}'" + nearest(name, table)) from None


def schema_target(target: str) -> str:
    """`"module:Class"` -> `"module:ClassConfig"`: a config is named after its class and stands in the same file."""
    return target + "Config"
