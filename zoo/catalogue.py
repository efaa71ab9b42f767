"""The catalogue: literal tables from the short names that recipes, cards and the Hub use to the classes behind them.

Nothing registers itself and nothing here imports what it names. To add a model: one line in MODELS, one in ENTRIES
for each published size, and one in CONVERTERS and REPLAYS if official weights exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zoo.catalogue_images import IMAGE_ENTRIES
from zoo.catalogue_video import VIDEO_ENTRIES
from zoo.errors import ConfigError, nearest

MODELS = {
    "videogpt": "zoo.models.videogpt:VideoGPT",
    "omnitokenizer": "zoo.models.omnitokenizer:OmniTokenizer",
    "open_magvit2": "zoo.models.open_magvit2:OpenMAGVIT2",
    "nbp_tokenizer": "zoo.models.nbp_tokenizer:NBPTokenizer",
    "nbp": "zoo.models.nbp:NBP",
    "metagene": "zoo.models.metagene:METAGENE",
    "generator": "zoo.models.generator:GENERator",
    "dnabert2": "zoo.models.dnabert2:DNABERT2",
    "seed": "zoo.models.seed:SEED",
    "maskgit": "zoo.models.maskgit:MaskGIT",
    "rar": "zoo.models.rar:RAR",
    "flextok": "zoo.models.flextok:FlexTok",
    "titok": "zoo.models.titok:TiTok",
    "flextok_vae": "zoo.models.flextok_vae:FlexTokVAE",
    "maskgit_vqgan": "zoo.models.maskgit_vqgan:MaskGITVQGAN",
    "hyenadna": "zoo.models.hyenadna:HyenaDNA",
    "mqt": "zoo.models.mqt:MQT",
    "lm": "zoo.models.lm:LM",
}

MIXERS = {
    "attention": "zoo.nn.attention:Attention",
    "softplus_attention": "zoo.nn.softplus_attention:SoftplusAttention",
    "hyena": "zoo.nn.hyena:Hyena",
    "lssl": "zoo.nn.s4:LSSL",
    "mamba2": "zoo.nn.mamba2:Mamba2",
    "s4": "zoo.nn.s4:S4",
    "s4d": "zoo.nn.s4:S4D",
    "based": "zoo.nn.based:Based",
    "jrt": "zoo.nn.based:JRT",
    "baseconv": "zoo.nn.baseconv:BaseConv",
    "h3": "zoo.nn.h3:H3",
    "ponet": "zoo.nn.ponet:PoNet",
    "orchid": "zoo.nn.orchid:Orchid",
    "memory": "zoo.nn.memory:NeuralMemory",
    "titans": "zoo.nn.titans:Titans",
    "longvq": "zoo.nn.longvq:LongVQ",
    "bidirectional": "zoo.nn.bidirectional:Bidirectional",
}

TOKENIZERS = {
    "char": "zoo.tokenizers.char:CharTokenizer",
    "kmer": "zoo.tokenizers.kmer:KmerTokenizer",
    "bpe": "zoo.tokenizers.bpe:BpeTokenizer",
    "word": "zoo.tokenizers.word:WordTokenizer",
}

DATAMODULES = {
    "genome": "zoo.datamodules.genome:GenomeData",
    "labelled": "zoo.datamodules.labelled:LabelledData",
    "reads": "zoo.datamodules.reads:ReadsData",
    "images": "zoo.datamodules.images:ImageData",
    "shards": "zoo.datamodules.shards:ShardData",
    "tokens": "zoo.datamodules.token_cache:TokenCache",
    "moving_mnist": "zoo.datamodules.moving_mnist:MovingMNIST",
    "videos": "zoo.datamodules.videos:VideoData",
    "clip_tokens": "zoo.datamodules.clip_tokens:ClipTokens",
    "vqa": "zoo.datamodules.vqa:VQAData",
}

TASKS = {
    "causal_lm": "zoo.tasks.causal_lm:CausalLM",
    "masked_lm": "zoo.tasks.masked_lm:MaskedLM",
    "classify": "zoo.tasks.classify:Classify",
    "image_reconstruction": "zoo.tasks.image_reconstruction:ImageReconstruction",
    "proxy_codes": "zoo.tasks.proxy_codes:ProxyCodes",
    "flow_matching": "zoo.tasks.flow_matching:FlowMatching",
    "token_generation": "zoo.tasks.token_generation:TokenGeneration",
    "video_reconstruction": "zoo.tasks.video_reconstruction:VideoReconstruction",
    "next_block": "zoo.tasks.next_block:NextBlock",
    "vqa": "zoo.tasks.vqa:VQA",
}

# official weights and configs <-> ours: module with to_zoo, to_official, config_from_official
CONVERTERS = {
    "videogpt": "zoo.convert.videogpt",
    "omnitokenizer": "zoo.convert.omnitokenizer",
    "open_magvit2": "zoo.convert.open_magvit2",
    "mqt": "zoo.convert.mqt",
    "nbp_tokenizer": "zoo.convert.nbp_tokenizer",
    "nbp": "zoo.convert.nbp",
    "metagene": "zoo.convert.metagene",
    "generator": "zoo.convert.generator",
    "dnabert2": "zoo.convert.dnabert2",
    "seed": "zoo.convert.seed",
    "maskgit": "zoo.convert.maskgit",
    "rar": "zoo.convert.rar",
    "flextok": "zoo.convert.flextok",
    "titok": "zoo.convert.titok",
    "flextok_vae": "zoo.convert.flextok_vae",
    "maskgit_vqgan": "zoo.convert.maskgit_vqgan",
    "hyenadna": "zoo.convert.hyenadna",
    "mamba2": "zoo.convert.mamba2",
    "based": "zoo.convert.based_lm",
    "h3": "zoo.convert.h3",
    "ponet": "zoo.convert.ponet",
}

# parity cases: system -> function that runs a case
REPLAYS = {
    "videogpt": "zoo.convert.videogpt:replay",
    "omnitokenizer": "zoo.convert.omnitokenizer:replay",
    "open_magvit2_video": "zoo.convert.open_magvit2:replay",
    "globalcom2": "zoo.convert.globalcom2:replay",
    "tokenunify": "zoo.convert.tokenunify:replay",
    "mqt": "zoo.convert.mqt:replay",
    "hired": "zoo.convert.token_reduction:replay_hired",
    "m3": "zoo.convert.token_reduction:replay_m3",
    "fvd": "zoo.convert.fvd:replay",
    "video_sampling": "zoo.convert.video_sampling:replay",
    "nbp_tokenizer": "zoo.convert.nbp_tokenizer:replay",
    "nbp": "zoo.convert.nbp:replay",
    "exact-byte": "zoo.convert.exact_byte:replay",
    "infini-gram": "zoo.convert.ngrams:replay_index",
    "aggressive-decoding": "zoo.convert.ngrams:replay_anchors",
    "streaming-llm": "zoo.convert.streaming_llm:replay",
    "lm-infinite": "zoo.convert.lm_infinite:replay",
    "h2o": "zoo.convert.h2o:replay",
    "token-recycling": "zoo.convert.token_recycling:replay",
    "spectr": "zoo.convert.spectr:replay",
    "rsd": "zoo.convert.rsd:replay",
    "optimal-tree": "zoo.convert.optimal_tree:replay",
    "lookahead": "zoo.convert.lookahead:replay",
    "set-based-prompting": "zoo.convert.set_based_prompting:replay",
    "giraffe": "zoo.convert.positions:replay_giraffe",
    "v2pe": "zoo.convert.positions:replay_v2pe",
    "metagene": "zoo.convert.metagene:replay",
    "generator": "zoo.convert.generator:replay",
    "dnabert2": "zoo.convert.dnabert2:replay",
    "hyena": "zoo.convert.hyenadna_parity:replay_hyena",
    "lfq": "zoo.convert.quantizers:replay_lfq",
    "flextok": "zoo.convert.flextok:replay",
    "flextok-vae": "zoo.convert.flextok_vae:replay",
    "maskgit-vqgan": "zoo.convert.maskgit_vqgan:replay",
    "lpips": "zoo.convert.image_losses:replay_lpips",
    "rfid": "zoo.convert.image_losses:replay_rfid",
    "rar": "zoo.convert.rar:replay",
    "titok-generator": "zoo.convert.maskgit:replay",
    "seed": "zoo.convert.seed:replay",
    "tatitok": "zoo.convert.titok:replay",
    "titok": "zoo.convert.titok:replay",
    "titok-discriminator": "zoo.convert.image_losses:replay_discriminator",
    "vq": "zoo.convert.quantizers:replay_vq",
    "hyenadna": "zoo.convert.hyenadna_parity:replay",
    "s4": "zoo.convert.s4:replay",
    "mamba2": "zoo.convert.mamba2:replay",
    "mamba2-ssd": "zoo.convert.mamba2:replay_ssd",
    "based": "zoo.convert.based:replay",
    "jrt": "zoo.convert.based:replay_jrt",
    "h3": "zoo.convert.h3:replay",
    "ponet": "zoo.convert.ponet:replay",
    "orchid": "zoo.convert.orchid:replay",
    "titans": "zoo.convert.titans:replay",
    "dataset-decomposition": "zoo.convert.dataset_decomposition:replay",
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
        file: the weights' file, where the repository holds several models.
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
    file: str = ""


ENTRIES: dict[str, Entry] = {
    "mqt-llava-7b": Entry(
        model="mqt",
        hub="gordonhu/MQT-LLaVA-7b",
        config={},
        params=7050846208,
        context=256,  # visual tokens of a picture
        vocab=0,
        tokenizer="",
        licence="apache-2.0",
        tasks=("answer",),
    ),
    "dnabert2-117m": Entry(
        model="dnabert2",
        hub="zhihan1996/DNABERT-2-117M",
        config={},
        params=117074176,
        context=512,  # of its config; ALiBi goes on beyond it
        vocab=4096,
        tokenizer="dnabert2-bpe",
        licence="apache-2.0",
        tasks=("masked_lm", "classify"),
    ),
    "generator-eukaryote-1.2b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-eukaryote-1.2b-base",
        config={},
        params=1162061824,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "generator-eukaryote-3b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-eukaryote-3b-base",
        config={"d_model": 3072, "n_layer": 30, "d_inner": 8448},
        params=2998262784,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "generator-v2-eukaryote-1.2b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-v2-eukaryote-1.2b-base",
        config={},
        params=1162061824,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "generator-v2-eukaryote-3b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-v2-eukaryote-3b-base",
        config={"d_model": 3072, "n_layer": 30, "d_inner": 8448},
        params=2998262784,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "generator-v2-prokaryote-1.2b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-v2-prokaryote-1.2b-base",
        config={},
        params=1162061824,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "generator-v2-prokaryote-3b": Entry(
        model="generator",
        hub="GenerTeam/GENERator-v2-prokaryote-3b-base",
        config={"d_model": 3072, "n_layer": 30, "d_inner": 8448},
        params=2998262784,
        context=16384,
        vocab=4128,
        tokenizer="generator-kmer6",
        licence="mit",
        tasks=("causal_lm", "classify"),
    ),
    "metagene-1": Entry(
        model="metagene",
        hub="metagene-ai/METAGENE-1",
        config={},
        params=6484660224,
        context=512,
        vocab=1024,
        tokenizer="metagene-bpe",
        licence="apache-2.0",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-tiny-1k": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-tiny-1k-seqlen",
        config={"d_model": 128, "n_layer": 2, "d_inner": 512, "max_len": 1026},
        params=436096,
        context=1026,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-tiny-1k-d256": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-tiny-1k-seqlen-d256",
        config={"d_model": 256, "n_layer": 2, "d_inner": 1024, "max_len": 1026},
        params=1641088,
        context=1026,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-tiny-16k-d128": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-tiny-16k-seqlen-d128",
        config={"d_model": 128, "n_layer": 2, "d_inner": 512, "max_len": 16386},
        params=436096,
        context=16386,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-small-32k": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-small-32k-seqlen",
        config={"d_model": 256, "n_layer": 4, "d_inner": 1024, "max_len": 32770},
        params=3277568,
        context=32770,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-medium-160k": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-medium-160k-seqlen",
        config={"d_model": 256, "n_layer": 8, "d_inner": 1024, "max_len": 160002},
        params=6550528,
        context=160002,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-medium-450k": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-medium-450k-seqlen",
        config={"d_model": 256, "n_layer": 8, "d_inner": 1024, "max_len": 450002},
        params=6550528,
        context=450002,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
    "hyenadna-large-1m": Entry(
        model="hyenadna",
        hub="LongSafari/hyenadna-large-1m-seqlen",
        config={"d_model": 256, "n_layer": 8, "d_inner": 1024, "max_len": 1000002},
        params=6550528,
        context=1000002,
        vocab=12,
        tokenizer="dna-char",
        licence="bsd-3-clause",
        tasks=("causal_lm", "classify"),
    ),
}

ENTRIES |= {name: Entry(**row) for name, row in IMAGE_ENTRIES.items()}
ENTRIES |= {name: Entry(**row) for name, row in VIDEO_ENTRIES.items()}


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


def list_models(query: str = "") -> list[str]:
    """Names of the published models whose name, family, Hub id, licence or task holds *query*."""
    wanted = query.lower()
    return [
        name
        for name, entry in ENTRIES.items()
        if any(wanted in text.lower() for text in (name, entry.model, entry.hub, entry.licence, *entry.tasks))
    ]
