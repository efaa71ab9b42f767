"""Vector quantization: the nearest vector of a learned codebook.

van den Oord et al. 2017 (arXiv 1711.00937) eq. 3; L2-normalised codes: Yu et al. 2021 (ViT-VQGAN, arXiv 2110.04627);
online clustering: Zheng and Vedaldi 2023 (CVQ-VAE, arXiv 2307.15139) eqs. 4-6.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.codebook import Quantized, gather_rows


@config
class VectorQuantizerConfig:
    """A codebook of `size` vectors of length `dim`.

    Attributes:
        size: number of codes.
        dim: length of a code.
        l2_norm: normalise the input and the codes to unit length before everything, losses included.
        commitment: weight of mean((sg(zq) - z)²), which pulls the encoder to the codes.
        codebook: weight of mean((zq - sg(z))²), which pulls the codes to the encoder. MaskGIT-VQGAN and SEED weigh
            the terms the other way round (1 and 0.25).
        update: `gradient` (the codebook loss), `ema` (moving averages of the assigned vectors, no codebook loss) or
            `cvq` (gradient, and unused codes are moved to features of the batch at each training step).
        anchor: where `cvq` moves unused codes: each to its `closest` feature, as TA-TiTok does, or to a `random` one,
            which also starts the codebook on data and keeps small batches from collapsing it (CVQ-VAE, arXiv
            2307.15139).
        decay: of the moving averages of `ema` and `cvq`.
    """

    size: int = 1024
    dim: int = 64
    l2_norm: bool = False
    commitment: float = 0.25
    codebook: float = 1.0
    update: Literal["gradient", "ema", "cvq"] = "gradient"
    anchor: Literal["closest", "random"] = "closest"
    decay: float = 0.99


class VectorQuantizer(nn.Module):
    """z [..., D] -> Quantized; always in float32. Index i is row i of `embedding.weight`."""

    embed_prob: Tensor
    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(self, config: VectorQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.dim = config.size, config.dim
        self.embedding = nn.Embedding(config.size, config.dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.size, 1 / config.size)
        if config.update == "cvq":
            self.register_buffer("embed_prob", torch.zeros(config.size))
        elif config.update == "ema":
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("cluster_size", torch.ones(config.size))
            self.register_buffer("embed_sum", self.embedding.weight.detach().clone())

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = z.reshape(-1, self.dim)
            weight = self.embedding.weight.float()
            if self.training and self.config.update != "gradient":
                weight = weight.clone()  # the update below must not change what this step's backward saved
            if self.config.l2_norm:
                z, weight = F.normalize(z, dim=-1), F.normalize(weight, dim=-1)
            ids = self.nearest(z.reshape(-1, self.dim), weight)
            zq = F.embedding(ids, weight).reshape(z.shape)
            commitment = self.config.commitment * F.mse_loss(zq.detach(), z)
            parts = {"commitment_loss": commitment}
            loss = commitment
            if self.config.update != "ema":
                parts["codebook_loss"] = self.config.codebook * F.mse_loss(zq, z.detach())
                loss = loss + parts["codebook_loss"]
            if self.training and self.config.update == "cvq":
                self._restart(flat.detach(), ids)
            elif self.training and self.config.update == "ema":
                self._average(z.detach().reshape(-1, self.dim), ids)
            codes = z + (zq - z).detach()
        return Quantized(codes, ids.reshape(z.shape[:-1]), loss, parts)

    @torch.no_grad()
    def nearest(self, z: Tensor, weight: Tensor, rows: int = 4096) -> Tensor:
        """[N] index of the code nearest to each of z [N, D]; *rows* vectors at a time bound the distance matrix."""
        norm = weight.square().sum(1)
        found = []
        for part in z.split(rows):
            found.append((part.square().sum(1, keepdim=True) + norm - 2 * part @ weight.T).argmin(1))
        return torch.cat(found) if found else z.new_zeros(0, dtype=torch.long)

    def lookup(self, ids: Tensor) -> Tensor:
        """[...] int -> [..., D] codes (unit vectors where `l2_norm`)."""
        codes = self.embedding(ids)
        return F.normalize(codes, dim=-1) if self.config.l2_norm else codes

    def mix(self, probabilities: Tensor) -> Tensor:
        """[..., size] -> [..., D]: the mean code under *probabilities* (TiTok decodes such mixtures)."""
        codes = probabilities.to(self.embedding.weight.dtype) @ self.embedding.weight
        return F.normalize(codes, dim=-1) if self.config.l2_norm else codes

    def soft_assign(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """[..., D] -> [..., size]: softmax(-distance² / temperature) over the codes."""
        weight = self.embedding.weight
        distance = z.square().sum(-1, keepdim=True) + weight.square().sum(1) - 2 * z @ weight.T
        return torch.softmax(-distance / temperature, dim=-1)

    @torch.no_grad()
    def _restart(self, z: Tensor, ids: Tensor) -> None:
        """CVQ: each code moves towards its nearest feature, the more the less it is used."""
        z, ids = gather_rows(z), gather_rows(ids[:, None])[:, 0]
        size, decay, weight = self.vocab_size, self.config.decay, self.embedding.weight
        usage = torch.bincount(ids, minlength=size).to(z) / ids.numel()
        self.embed_prob.mul_(decay).add_(usage, alpha=1 - decay)
        codes, features = weight.float(), z
        if self.config.l2_norm:  # nearest in the space of the codes; the un-normalised feature is what is copied
            codes, features = F.normalize(codes, dim=-1), F.normalize(features, dim=-1)
        if self.config.anchor == "random":
            chosen = torch.randint(len(z), (size,), device=z.device)
        else:
            chosen = self.nearest(codes, features)
        nearest = z[chosen]
        a = torch.exp(-(self.embed_prob * size * 10) / (1 - decay) - 1e-3)[:, None]
        weight.copy_(weight * (1 - a) + nearest * a)

    @torch.no_grad()
    def _average(self, z: Tensor, ids: Tensor) -> None:
        """EMA codebook with Laplace-smoothed cluster sizes (van den Oord et al. 2017, appendix A.1)."""
        z, ids = gather_rows(z), gather_rows(ids[:, None])[:, 0]
        decay = self.config.decay
        count = torch.bincount(ids, minlength=self.vocab_size).to(z)
        total = torch.zeros_like(self.embed_sum).index_add_(0, ids, z)
        self.cluster_size.mul_(decay).add_(count, alpha=1 - decay)
        self.embed_sum.mul_(decay).add_(total, alpha=1 - decay)
        n = self.cluster_size.sum()
        smoothed = (self.cluster_size + 1e-5) / (n + self.vocab_size * 1e-5) * n
        self.embedding.weight.copy_(self.embed_sum / smoothed[:, None])
