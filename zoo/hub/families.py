"""What cards say of a model family: one sentence for newcomers, the paper, the limits, and a small example."""

from __future__ import annotations

from dataclasses import dataclass, field
from pprint import pformat
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
        call: for models that do not read token ids: what the example does with `model`, one expression.
        measured: what small models of the family reached here, and where the numbers are kept.
    """

    about: str
    paper: str
    limits: str
    tags: tuple[str, ...] = ()
    text: str = ""
    tiny: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, int] = (0, 0)
    call: str = ""
    measured: str = ""


_TOKENS = "Its tokens hold several bases, so one changed base can change how the rest of the sequence is cut."
_VIT = {"width": 32, "layers": 2, "heads": 4, "mlp": {"kind": "gelu", "width": 64}}
_STACK = {"widths": [16, 32], "decoder_blocks": 3, "z_channels": 4, "groups": 8, "mid_attention": True}

FAMILIES: dict[str, Family] = {
    "mqt": Family(
        about="A vision-language model that answers questions about pictures with any number of visual tokens up to "
        "its maximum (256 in MQT-LLaVA), chosen when it is asked: fewer tokens, less work.",
        paper="Hu et al. 2024, Matryoshka Query Transformer for Large Vision-Language Models, arXiv:2405.19315",
        limits="The released query transformer looks at the same places of every picture, since its keys hold no "
        "content. The released decoder is a fine-tuned Vicuna, so Llama 2's community licence applies to it as well.",
        tags=("vision-language", "visual-question-answering"),
        tiny={
            "tower": {
                "vit": {"width": 16, "layers": 2, "heads": 2, "mlp": {"kind": "quick_gelu", "width": 32}},
                "size": 28,
                "patch": 7,
            },
            "queries": {"grid": 3, "width": 16, "out_width": 24, "heads": 2, "source": [4, 4]},
            "lm": {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 20},
        },
        call="model(torch.tensor([[1, -200, 5]]), torch.rand(1, 3, 28, 28), m=2)",
    ),
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
    "titok": Family(
        about="TiTok turns a picture of 256 pixels into 32 to 256 one-dimensional tokens with a transformer that reads "
        "the patches into latent tokens, and back; TA-TiTok also shows the caption to the decoder.",
        paper="Yu et al. 2024, An Image is Worth 32 Tokens for Reconstruction and Generation, arXiv:2406.07550; Kim et "
        "al. 2025, Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional "
        "Tokens, arXiv:2501.07730",
        limits="It takes pictures of one size only. TA-TiTok needs the caption's CLIP ViT-L/14-336 token states.",
        tags=("image-tokenizer", "vector-quantization"),
        tiny={
            "encoder": _VIT,
            "decoder": _VIT,
            "encoder_patch": 8,
            "decoder_patch": 8,
            "latents": 4,
            "quantizer": {"size": 16, "dim": 6},
            "preprocess": {"size": 16},
        },
        call="model.encode(torch.rand(1, 3, 16, 16))",
    ),
    "maskgit_vqgan": Family(
        about="MaskGIT-VQGAN is the convolutional tokenizer behind TiTok, MaskGIT and RAR: one of 1,024 codes for each "
        "16 x 16 pixels.",
        paper="Chang et al. 2022, MaskGIT: Masked Generative Image Transformer, arXiv:2202.04200",
        limits="Sides must be multiples of 16; it was trained on ImageNet at 256 pixels.",
        tags=("image-tokenizer", "vector-quantization"),
        tiny={"stack": {"widths": [32, 64], "z_channels": 8}, "quantizer": {"size": 16, "dim": 8}},
        call="model.encode(torch.rand(1, 3, 16, 16))",
    ),
    "flextok_vae": Family(
        about="FlexTok's VAE maps a picture to continuous latents of an eighth of its size, and back.",
        paper="Bachmann et al. 2025, FlexTok: Resampling Images into 1D Token Sequences of Flexible Length, "
        "arXiv:2502.13967",
        limits="Its latents are continuous; it has no ids. Weights for research only.",
        tags=("image-autoencoder",),
        tiny={"stack": _STACK},
        call="model.encode_latents(torch.rand(1, 3, 16, 16))",
    ),
    "flextok": Family(
        about="FlexTok turns a picture into up to 256 ordered tokens of which any prefix decodes to a picture, coarse "
        "to fine, by a rectified-flow decoder.",
        paper="Bachmann et al. 2025, FlexTok: Resampling Images into 1D Token Sequences of Flexible Length, "
        "arXiv:2502.13967",
        limits="Decoding draws a sample: the same tokens give different pictures with another seed. The released "
        "config could not be read; its names and shapes were reconstructed. Weights for research only.",
        tags=("image-tokenizer", "flow-matching"),
        tiny={
            "vae": {"stack": _STACK, "preprocess": {"size": 16}},
            "channels": 4,
            "latent_size": 8,
            "registers": 4,
            "encoder": _VIT,
            "decoder": {**_VIT, "adaln": True, "adaln_groups": 2},
            "preprocess": {"size": 16},
        },
        call="model.encode(torch.rand(1, 3, 16, 16))",
    ),
    "seed": Family(
        about="SEED turns a picture into 32 causal tokens of its meaning, for language models that read and write "
        "pictures; they decode to a CLIP image embedding.",
        paper="Ge et al. 2023, Planting a SEED of Vision in Large Language Model, arXiv:2307.08041; Making LLaMA SEE "
        "and Draw with SEED Tokenizer, arXiv:2310.01218",
        limits="Pixels need an unCLIP diffusion model, which is not part of this package, and show the meaning of the "
        "picture rather than the picture.",
        tags=("image-tokenizer", "vector-quantization"),
        tiny={
            "vit": {**_VIT, "qkv_bias": "qv"},
            "patch": 7,
            "embed_width": 6,
            "decoder": {**_VIT, "width": 24},
            "qformer": {"width": 24, "encoder_width": 32, "layers": 2, "heads": 4, "inner": 32, "queries": 4},
            "quantizer": {"size": 16, "dim": 6},
            "preprocess": {"size": 14},
        },
        call="model.encode(torch.rand(1, 3, 14, 14))",
    ),
    "maskgit": Family(
        about="MaskGIT generates the tokens of a picture of a given class in a few parallel steps, filling in the ones "
        "it is surest of first.",
        paper="Chang et al. 2022, MaskGIT: Masked Generative Image Transformer, arXiv:2202.04200; Yu et al. 2024, "
        "arXiv:2406.07550",
        limits="It makes tokens of one tokenizer, in the classes of ImageNet.",
        tags=("image-generation",),
        tiny={"codes": 12, "classes": 3, "length": 6, "vit": {**_VIT, "prenorm": False}},
        call="model(torch.zeros(1, 6, dtype=torch.long), torch.tensor([2]))",
    ),
    "rar": Family(
        about="RAR generates the tokens of a picture of a given class one after the other; it was trained on random "
        "orders first, so that each token knows its whole surroundings.",
        paper="Yu et al. 2024, Randomized Autoregressive Visual Generation, arXiv:2411.00776",
        limits="It makes tokens of MaskGIT-VQGAN, in the classes of ImageNet.",
        tags=("image-generation",),
        tiny={"codes": 12, "classes": 3, "length": 6, "vit": {**_VIT, "qk_norm": "affine", "adaln": True}},
        call="model(torch.zeros(1, 6, dtype=torch.long), torch.tensor([2]))",
    ),
    "nbp": Family(
        about="NBP generates video tokens a block at a time: all tokens of a block see each other and come out of one "
        "pass, so that a clip takes a fraction of the steps of next-token prediction.",
        paper="Ren et al. 2025, Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, "
        "arXiv:2502.07737",
        limits="It makes tokens of its own tokenizer, for clips of 17 frames of 128 x 128 pixels. Tokens of a block "
        "are drawn independently of each other. The UCF-101 models take the class name as Llama tokens, which are not "
        "part of this package; the Kinetics-600 models continue two latent frames.",
        measured="Models of 960,640 parameters, trained for 600 steps on the ids of moving digits, make a clip from "
        "two latent frames with tokenizing in 192 passes at 12.1 frames a second (next-token prediction) and in 12 "
        "passes at 103.3 (blocks of 16), on one thread with a key-value cache. The likeliest next frame has a PSNR of "
        "15.04 and 15.84 dB; a repeated frame has 15.60. The whole sweep is in `benchmarks/results/next_block.json`.",
        tags=("video-generation", "next-block-prediction"),
        tiny={
            "d_model": 32,
            "n_layer": 2,
            "options": {"heads": 4, "bias": True, "out_bias": True},
            "mlp": {"kind": "gelu", "width": 64},
            "video_vocab": 16,
            "grid": [3, 2, 4],
            "block": 4,
            "max_len": 64,
        },
        call="model(model.arrange(torch.zeros(1, 3, 2, 4, dtype=torch.long))[0])",
    ),
    "nbp_tokenizer": Family(
        about="NBP's tokenizer turns a clip into one of 64,000 codes for each 4 x 8 x 8 pixels by 3-D convolutions "
        "that are causal in time; a picture is a clip of one frame.",
        paper="Ren et al. 2025, Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, "
        "arXiv:2502.07737; Yu et al. 2023, MAGVIT-v2, arXiv:2310.05737",
        limits="Clips have 1 + 4n frames and sides that are multiples of 8; it was trained on 17 frames of 128 x 128 "
        "pixels of one data set.",
        tags=("video-tokenizer", "finite-scalar-quantization"),
        tiny={"widths": [4, 4, 8], "blocks": 1, "groups": 2},
        call="model.encode(torch.rand(1, 3, 5, 16, 16))",
    ),
    "omnitokenizer": Family(
        about="OmniTokenizer turns pictures and clips into codes or latents, one for each 4 x 8 x 8 pixels, with "
        "attention within frames, within windows of them and along time.",
        paper="Wang et al. 2024, OmniTokenizer: A Joint Image-Video Tokenizer for Visual Generation, arXiv:2406.09399",
        limits="Clips have 1 + 4n square frames of whole windows (64 pixels). It is not causal: the positional "
        "convolution of its temporal blocks mixes space and time, so that a picture's tokens are not those of the "
        "same frame at the head of a clip.",
        tags=("video-tokenizer", "vector-quantization"),
        tiny={
            "width": 16,
            "heads": 2,
            "head_dim": 8,
            "encoder": "tw",
            "decoder": "t",
            "temporal": 1,
            "window": 2,
            "quantizer": {"size": 32, "dim": 4, "update": "ema"},
        },
        call="model.encode(torch.rand(1, 3, 5, 16, 16))",
    ),
    "open_magvit2": Family(
        about="Open-MAGVIT2 turns a clip into 18 bits for each 4 x 8 x 8 pixels by 3-D convolutions and look-up-free "
        "quantization.",
        paper="Luo et al. 2024, Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual "
        "Generation, arXiv:2409.04410",
        limits="It is not causal: its group norms see the whole clip. Of a file that holds a moving average of the "
        "weights that one is loaded, as the authors evaluate it.",
        tags=("video-tokenizer", "look-up-free-quantization"),
        tiny={"width": 32, "mults": [1, 1, 2, 2], "blocks": 1, "quantizer": {"dim": 6}},
        call="model.encode(torch.rand(1, 3, 5, 16, 16))",
    ),
}


def tiny_example(family: str, target: str) -> str:
    """Python that builds a small model of *family*, a class `module:Name`, and runs it where that needs only ids."""
    module, _, name = target.partition(":")
    known = FAMILIES.get(family)
    if known is None or not known.tiny:
        return f"from {module} import {name}Config\n\nprint({name}Config())"
    fields = ", ".join(f"{key}={value!r}" for key, value in known.tiny.items())
    if known.call:
        return (
            f"import torch\nfrom {module} import {name}, {name}Config\nfrom zoo.config import from_dict\n\n"
            f"config = {pformat(known.tiny, width=100, sort_dicts=False)}\n"
            f"model = {name}(from_dict({name}Config, config)).eval()\n"
            f"print({known.call}.shape)"
        )
    low, high = known.ids
    return (
        f"import torch\nfrom {module} import {name}, {name}Config\n\n"
        f"model = {name}({name}Config({fields})).eval()\n"
        f"logits = model(torch.randint({low}, {high + 1}, (2, 48)))\n"
        "print(logits.shape)  # [batch, length, vocabulary rows]"
    )
