"""SEED: 32 causal, semantic tokens a picture, which decode to a CLIP image embedding for an unCLIP diffusion model.

Ge et al. 2023 (arXiv 2307.08041 and, for SEED-2, 2310.01218) section 3.
"""

from __future__ import annotations

from dataclasses import field, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.visual import Reconstruction, VisualModel
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig, normalize
from zoo.nn.qformer import QFormer, QFormerConfig
from zoo.nn.vit import ViT, ViTConfig
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


def eva_vit(width: int = 1408, layers: int = 39, heads: int = 16, ratio: float = 4.3637) -> ViTConfig:
    """EVA-CLIP's image transformer: no bias on keys."""
    return ViTConfig(
        width=width,
        layers=layers,
        heads=heads,
        mlp=MLPConfig(kind="gelu", width=int(width * ratio)),
        qkv_bias="qv",
        eps=1e-6,
    )


def decoder_vit(width: int = 768, layers: int = 4, heads: int = 12) -> ViTConfig:
    """The transformer behind the codebook."""
    return ViTConfig(width=width, layers=layers, heads=heads, mlp=MLPConfig(kind="gelu", width=4 * width), eps=1e-6)


@config
class SEEDConfig:
    """The defaults are SEED-2's tokenizer (1.15 G elements).

    Attributes:
        vit: EVA-CLIP image encoder without a final norm; patch is the side of its patches.
        qformer: reads the image features.
        quantizer: codebook; its loss weighs commitment 1 and codebook 0.25 (taming's legacy form).
        decoder: blocks behind the codebook, one stack for the causal embeddings and one for the image embedding.
        embedder: how an image embedding is made: `image_down` (the released weights) or `reverse_qformer` (one query,
            the published training script).
        embed_width: of the CLIP image embedding.
        preprocess: of pictures. The official class squeezes them to 224 x 224 with bicubic interpolation, some of
            its scripts with bilinear, which gives other ids.
    """

    vit: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=1408, layers=39, heads=16, mlp=MLPConfig(kind="gelu", width=6144), qkv_bias="qv", eps=1e-6
        )
    )
    patch: int = 14
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    quantizer: VectorQuantizerConfig = field(
        default_factory=lambda: VectorQuantizerConfig(size=8192, dim=32, commitment=1.0, codebook=0.25)
    )
    decoder: ViTConfig = field(
        default_factory=lambda: ViTConfig(
            width=768, layers=4, heads=12, mlp=MLPConfig(kind="gelu", width=3072), eps=1e-6
        )
    )
    embedder: Literal["image_down", "reverse_qformer"] = "image_down"
    embed_width: int = 1024
    preprocess: PreprocessConfig = field(
        default_factory=lambda: PreprocessConfig(
            size=224, resize="both", kernel="bicubic",
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
        )
    )  # fmt: skip


class EVAViT(nn.Module):
    """[B, 3, S, S], normalised -> [B, 1 + g², E]: class token and patches."""

    def __init__(self, config: SEEDConfig) -> None:
        super().__init__()
        width = config.vit.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn((config.preprocess.size // config.patch) ** 2 + 1, width))
        self.transformer = ViT(config.vit)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.transformer(x)


class SEED(VisualModel):
    """Pixels [B, 3, S, S] -> ids [B, 32] -> CLIP image embedding [B, 1024]."""

    def __init__(self, config: SEEDConfig) -> None:
        super().__init__()
        self.config = config
        width, codes = config.qformer.width, config.quantizer.dim
        self.vit = EVAViT(config)
        self.norm_vision = nn.LayerNorm(config.vit.width)
        self.qformer = QFormer(config.qformer)
        self.to_codes = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, codes))
        self.quantizer = VectorQuantizer(config.quantizer)
        self.from_codes = nn.Sequential(nn.Linear(codes, codes), nn.Tanh(), nn.Linear(codes, width))
        count = config.qformer.queries
        self.pos_embed = nn.Parameter(0.02 * torch.randn(count, width))
        self.pos_embed_image = nn.Parameter(0.02 * torch.randn(count, width))
        self.blocks = ViT(config.decoder)  # these two serve the training loss alone
        self.blocks_image = ViT(config.decoder)
        self.image_down: nn.Sequential | None = None
        self.reverse_qformer: QFormer | None = None
        if config.embedder == "image_down":
            sizes = (width, 256, 128, 32)
            linears = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
            self.image_down = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
            self.image_head = nn.Linear(count * sizes[-1], config.embed_width)
        else:
            self.reverse_qformer = QFormer(reverse_config(config.qformer))
            self.image_head = nn.Linear(width, config.embed_width)
        self.vocab_size = config.quantizer.size
        self.num_tokens = count

    def features(self, x: Tensor) -> Tensor:
        """Normalised pictures -> causal query states [B, 32, D]."""
        return self.qformer(self.norm_vision(self.vit(x)))

    def image_embedding(self, decoded: Tensor) -> Tensor:
        """Decoded codes [B, 32, D] -> [B, E]."""
        x = self.blocks_image(decoded + self.pos_embed_image)
        if self.image_down is not None:
            return self.image_head(self.image_down(x).flatten(1))
        assert self.reverse_qformer is not None
        return self.image_head(self.reverse_qformer(x)[:, 0])

    def forward(self, pixels: Tensor, clip_embedding: Tensor) -> Reconstruction:
        """Stage 2: pixels and the CLIP embedding [B, E] of the same pictures -> the predicted embedding.

        loss = 5 · quantizer + 2 · (1 - cos(reconstructed, causal states)) + 0.5 · mean squared error of embeddings.
        """
        self.check_pixels(pixels)
        states = self.features(normalize(pixels, self.config.preprocess))
        result = self.quantizer(self.to_codes(states))
        decoded = self.from_codes(result.codes.to(states.dtype))
        rebuilt = self.blocks(decoded + self.pos_embed)
        embedding = self.image_embedding(decoded)
        parts = stage2_losses(result.loss, rebuilt, states, embedding, clip_embedding)
        return Reconstruction(embedding, result.ids, parts.pop("total"), parts)

    def example_inputs(self) -> dict[str, Tensor]:
        embedding = torch.randn(1, self.config.embed_width, generator=torch.Generator().manual_seed(21))
        return {**super().example_inputs(), "clip_embedding": embedding}

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        z = self.to_codes(self.features(normalize(pixels, self.config.preprocess))).float()
        nearest = self.quantizer.nearest(z.flatten(0, 1), self.quantizer.embedding.weight.float())
        return nearest.unflatten(0, z.shape[:2])

    @torch.no_grad()
    def decode_embedding(self, ids: Tensor) -> Tensor:
        """Ids [B, 32] -> CLIP image embedding [B, E], the condition of stabilityai/stable-diffusion-2-1-unclip."""
        self.check_ids(ids)
        return self.image_embedding(self.from_codes(self.quantizer.lookup(ids)))

    def decode(self, ids: Tensor) -> Tensor:
        """Raises ZooError: pixels need a diffusion model that is not part of this package."""
        raise ZooError(
            "SEED decodes ids to a CLIP image embedding (decode_embedding); for pixels, pass it to an unCLIP "
            "diffusion pipeline such as stabilityai/stable-diffusion-2-1-unclip (20 steps, guidance 10, noise level 0)"
        )

    def freeze_encoder(self) -> None:
        """Stage 2 leaves the image encoder and the Q-Former as they are."""
        for part in (self.vit, self.norm_vision, self.qformer):
            part.requires_grad_(False)


def reverse_config(config: QFormerConfig) -> QFormerConfig:
    """The Q-Former behind the codebook: one query, which reads the decoded tokens; not causal."""
    return replace(config, queries=1, causal=False, encoder_width=config.width, text_vocab=0)


def stage2_losses(
    quantizer: Tensor, rebuilt: Tensor, states: Tensor, embedding: Tensor, clip_embedding: Tensor
) -> dict[str, Tensor]:
    """SEED's stage-2 losses and their weighted sum, `total`."""
    recon = 1 - F.cosine_similarity(rebuilt, states.detach(), dim=-1).mean()
    distill = F.mse_loss(embedding, clip_embedding)
    total = 5 * quantizer + 2 * recon + 0.5 * distill
    return {"quantizer_loss": quantizer, "recon_loss": recon, "distill_loss": distill, "total": total}


@config
class SEEDContrastiveConfig:
    """Stage 1: the Q-Former learns causal queries by contrast with captions.

    Attributes:
        qformer: with a text side (`text_vocab`).
        embed_width: of the common space.
        temperature: start of the learned temperature.
        label_smoothing: of the contrastive loss.
    """

    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(text_vocab=30522))
    embed_width: int = 256
    temperature: float = 0.07
    label_smoothing: float = 0.1


class SEEDContrastive(nn.Module):
    """Image features [B, S, E] of a frozen encoder and captions -> contrastive loss of the LAST query's embedding."""

    def __init__(self, config: SEEDContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.qformer = QFormer(config.qformer)
        self.vision_proj = nn.Linear(config.qformer.width, config.embed_width)
        self.text_proj = nn.Linear(config.qformer.width, config.embed_width)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def embed_image(self, states: Tensor) -> Tensor:
        """Query states [B, K, D] -> unit vectors [B, embed_width]."""
        return F.normalize(self.vision_proj(states[:, -1]), dim=-1)

    def embed_text(self, states: Tensor) -> Tensor:
        """Caption states [B, T, D] -> unit vectors of the first word."""
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """[B, B]: image i against caption j, over the temperature."""
        return image @ text.T / self.temperature

    def forward(self, features: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """Mean cross-entropy of finding the caption of an image and the image of a caption in the batch."""
        image = self.embed_image(self.qformer(features))
        similarity = self.similarity(image, self.embed_text(self.qformer.text(text, valid)))
        return contrastive_loss(similarity, self.config.label_smoothing)


def contrastive_loss(similarity: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Symmetric cross-entropy of [B, B] similarities whose diagonal is right."""
    labels = torch.arange(len(similarity), device=similarity.device)
    both = [F.cross_entropy(s, labels, label_smoothing=label_smoothing) for s in (similarity, similarity.T)]
    return (both[0] + both[1]) / 2
