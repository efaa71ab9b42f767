"""What cards say of a model family: one sentence for newcomers, the paper, the limits, and a small example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts that hold for every model of a family.

    Attributes:
        about: what it is.
        paper: authors, year, title, address.
        limits: what it cannot do, for the card's section of that name.
        tags: for the Hub's search.
        text: a short input for examples; empty where the model reads no text.
        tiny: config fields of a model that is built and run in a moment.
        ids: (lowest, highest) token id of the example's random input.
    """

    about: str
    paper: str
    limits: str
    tags: tuple[str, ...] = ()
    text: str = ""
    tiny: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, int] = (0, 0)


_TOKENS = "Its tokens hold several bases, so one changed base can change how the rest of the sequence is cut."

FAMILIES: dict[str, Family] = {
    "hyenadna": Family(
        about="HyenaDNA reads DNA one base at a time with long convolutions in place of attention, so that a sequence "
        "of a million bases costs little more than its length.",
        paper="Nguyen et al. 2023, HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution, "
        "arXiv:2306.15794",
        limits="It reads from left to right and one strand only: predictions for a sequence and for its reverse "
        "complement differ. Its filters are tied to the longest input it was built for.",
        tags=("dna", "genomics", "hyena", "long-convolution"),
        text="ACGTACGTTAGC",
        tiny={"d_model": 32, "n_layer": 2, "max_len": 66},
        ids=(7, 10),
    ),
    "dnabert2": Family(
        about="DNABERT-2 is an encoder over byte-pair tokens of the genomes of 135 species, trained to fill in masked "
        "tokens; positions enter through ALiBi's distance bias.",
        paper="Zhou et al. 2023, DNABERT-2: Efficient Foundation Model and Benchmark for Multi-Species Genome, "
        "arXiv:2306.15006",
        limits=f"It reads one strand and gives no probability of a whole sequence. {_TOKENS}",
        tags=("dna", "genomics", "masked-language-model", "alibi"),
        text="ACGTACGTTAGC",
        tiny={"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": 64},
        ids=(5, 63),
    ),
    "generator": Family(
        about="GENERator is a decoder over 6-mers, trained on gene regions to continue DNA, to classify it and to "
        "score variants, with a context of up to 98,000 bases.",
        paper="Wu et al. 2025, GENERator: A Long-Context Generative Genomic Foundation Model, arXiv:2502.07272",
        limits="Sequences are read in steps of six bases from their first one, so a shifted start gives other tokens. "
        "Generated DNA has no guarantee of any function.",
        tags=("dna", "genomics", "generation", "k-mer"),
        text="ACGTACGTTAGC",
        tiny={"d_model": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_inner": 64, "vocab_size": 64},
        ids=(32, 63),
    ),
    "metagene": Family(
        about="METAGENE-1 is a decoder over byte-pair tokens of DNA and RNA from wastewater, for finding and "
        "describing what is in metagenomic samples.",
        paper="Liu et al. 2025, METAGENE-1: Metagenomic Foundation Model for Pandemic Monitoring, arXiv:2501.02045",
        limits=f"It was trained on short reads and takes 512 tokens. {_TOKENS}",
        tags=("dna", "genomics", "metagenomics"),
        text="ACGTACGTTAGC",
        tiny={"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": 64},
        ids=(5, 63),
    ),
}


def tiny_example(family: str, target: str) -> str:
    """Python that builds a small model of *family*, a class `module:Name`, and runs it where that needs only ids."""
    module, _, name = target.partition(":")
    known = FAMILIES.get(family)
    if known is None or not known.tiny:
        return f"from {module} import {name}Config\n\nprint({name}Config())"
    fields = ", ".join(f"{key}={value!r}" for key, value in known.tiny.items())
    low, high = known.ids
    return (
        f"import torch\nfrom {module} import {name}, {name}Config\n\n"
        f"model = {name}({name}Config({fields})).eval()\n"
        f"logits = model(torch.randint({low}, {high + 1}, (2, 48)))\n"
        "print(logits.shape)  # [batch, length, vocabulary rows]"
    )
