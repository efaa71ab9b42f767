"""Look-up-free quantization: one bit a dimension, by its sign (Yu et al. 2023, MAGVIT-v2, arXiv 2310.05737).

With `spherical` the input is first put on the unit sphere: binary spherical quantization (Zhao et al. 2024, arXiv
2406.07548).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.nn.codebook import Quantized


@config
class LFQConfig:
    """An implicit codebook of 2^dim sign vectors.

    Attributes:
        dim: number of bits.
        temperature: of the soft assignment in the entropy loss.
        sample_entropy: weight of the entropy of each vector's own soft assignment (minimised: be certain).
        batch_entropy: weight of the entropy of the batch's mean assignment (maximised: use all codes).
        entropy: weight of that difference in the loss.
        commitment: weight of mean((z - sg(code))²) in the loss.
        spherical: BSQ: normalise z to length 1, codes are ±1/sqrt(dim).
        factorized: compute the entropies bit by bit; False enumerates all 2^dim codes, as Open-MAGVIT2 does. They
            differ by the rounding of the latter alone, whose logits reach hundreds.
        big_endian: bit 0 is the most significant one (vector-quantize-pytorch); Open-MAGVIT2's weights need False.
    """

    dim: int = 18
    temperature: float = 0.01
    sample_entropy: float = 1.0
    batch_entropy: float = 1.0
    entropy: float = 1.0
    commitment: float = 0.25
    spherical: bool = False
    factorized: bool = True
    big_endian: bool = False


class LFQ(nn.Module):
    """z [..., D] -> Quantized. Index layout: id = sum_i bit_i · 2^i (2^(D-1-i) if `big_endian`), bit = z > 0."""

    basis: Tensor

    def __init__(self, config: LFQConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.dim = 2**config.dim, config.dim
        basis = 2 ** torch.arange(config.dim)
        self.register_buffer("basis", basis.flip(0) if config.big_endian else basis, persistent=False)
        self.scale = config.dim**-0.5 if config.spherical else 1.0

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.config.spherical:
                z = F.normalize(z, dim=-1)
            bits = z > 0
            hard = torch.where(bits, self.scale, -self.scale).to(z)
            ids = (bits * self.basis).sum(-1)
            sample, batch = self.entropies(z)
            gap = self.config.sample_entropy * sample - self.config.batch_entropy * batch
            commitment = F.mse_loss(z, hard)
            loss = self.config.entropy * gap + self.config.commitment * commitment
            parts = {
                "sample_entropy": sample, "batch_entropy": batch, "entropy_loss": gap, "commitment_loss": commitment
            }  # fmt: skip
        return Quantized(z + (hard - z).detach(), ids, loss, parts)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of softmax(2 z·c / T) over all 2^D codes, and entropy of the mean of those softmaxes (nats).

        The softmax over sign vectors is a product of independent bits. So the first is a sum over bits, and the
        second comes from one matrix product of two half-codebooks: 2^18 codes need no [N, 2^18] table.
        """
        if not self.config.factorized:
            return self._enumerated(z.reshape(-1, self.dim))
        logits = 4 * self.scale * z.reshape(-1, self.dim) / self.config.temperature  # of bit 1 against bit 0
        log_on, log_off = F.logsigmoid(logits), F.logsigmoid(-logits)
        sample = -(log_on.exp() * log_on + log_off.exp() * log_off).sum(-1).mean()
        pairs = torch.stack([log_off, log_on], -1).exp()  # [N, D, 2]
        left, right = (_product(half) for half in pairs.split([self.dim // 2, self.dim - self.dim // 2], dim=1))
        mean = left.T @ right / len(logits)
        return sample, -(mean * (mean + 1e-5).log()).sum()

    def _enumerated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.lookup(torch.arange(self.vocab_size, device=z.device))
        logits = 2 * z @ codes.T / self.config.temperature
        p, log_p = torch.softmax(logits, -1), torch.log_softmax(logits + 1e-5, -1)
        mean = p.mean(0)
        return -(p * log_p).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()

    def lookup(self, ids: Tensor) -> Tensor:
        """[...] int -> [..., D] codes."""
        return torch.where((ids[..., None] & self.basis) != 0, self.scale, -self.scale)


def _product(pairs: Tensor) -> Tensor:
    """[N, d, 2] probabilities of bits -> [N, 2^d] probabilities of all bit vectors."""
    table = pairs.new_ones(len(pairs), 1)
    for i in range(pairs.shape[1]):
        table = (table[:, :, None] * pairs[:, i, None, :]).flatten(1)
    return table
