"""Perceptual distances: LPIPS on VGG-16 features and the logit distance of a ConvNeXt-S.

Zhang et al. 2018 (arXiv 1801.03924). Backbone weights are never downloaded and never random: they come from files
whose paths and sha256 the config names, and a loss without its file is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn.preprocess import IMAGENET_MEAN, IMAGENET_STD

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Features(nn.Module):
    """The five ReLU outputs before the poolings (relu1_2 ... relu5_3) of a VGG-16, [B, 3, H, W] -> 5 maps."""

    def __init__(self) -> None:
        super().__init__()
        width, stages = 3, []
        for sizes in _VGG16:
            convs = []
            for size in sizes:
                convs.append(nn.Conv2d(width, size, 3, padding=1))
                width = size
            stages.append(nn.ModuleList(convs))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, stage in enumerate(self.stages):
            if i:
                x = F.max_pool2d(x, 2)
            for conv in stage.children():
                x = F.relu(conv(x))
            maps.append(x)
        return maps


class LPIPS(nn.Module):
    """Learned distance of two pictures in [0, 1], [B, 3, H, W] each -> [B, 1, 1, 1]."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = VGG16Features()
        self.heads = nn.ModuleList(nn.Conv2d(sizes[-1], 1, 1, bias=False) for sizes in _VGG16)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        maps_a, maps_b = (self.features(((x * 2 - 1) - self.shift) / self.scale) for x in (a, b))
        total = a.new_zeros(())
        for head, x, y in zip(self.heads, maps_a, maps_b, strict=True):
            gap = (_unit(x) - _unit(y)).square()
            total = total + head(gap).mean(dim=(2, 3), keepdim=True)
        return total


def _unit(x: Tensor, eps: float = 1e-10) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + eps)


@config
class PerceptualConfig:
    """Which perceptual terms a training uses; the loss is their weighted mean.

    TiTok's stage 2 uses ConvNeXt alone; its one-stage recipe and TA-TiTok use LPIPS 1.0 and ConvNeXt 0.1.

    Attributes:
        lpips: weight of LPIPS, 0 leaves it out.
        convnext: weight of the mean squared error between ConvNeXt-S logits at 224 pixels, 0 leaves it out.
        lpips_weights: safetensors or pickle file of LPIPS (official or our names), whole or its linear heads alone,
            as the published `vgg.pth` has them.
        vgg_weights: torchvision's VGG-16 file, where the other holds the heads alone.
        convnext_weights: file of torchvision's convnext_small.
        lpips_sha256, vgg_sha256, convnext_sha256: of the files; "" accepts any.
    """

    lpips: float = 0.0
    convnext: float = 0.0
    lpips_weights: str = ""
    vgg_weights: str = ""
    convnext_weights: str = ""
    lpips_sha256: str = ""
    vgg_sha256: str = ""
    convnext_sha256: str = ""


class PerceptualLoss(nn.Module):
    """Weighted mean of the configured terms for pictures in [0, 1]; frozen, always in eval mode.

    Raises:
        ZooError: a term is switched on but its weights file is not named, is missing or has another sha256.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.config = config
        self.lpips: LPIPS | None = None
        self.convnext: nn.Module | None = None
        if config.lpips:
            self.lpips = LPIPS()
            state = _lpips_state(_read(config.lpips_weights, config.lpips_sha256, "lpips"))
            if config.vgg_weights:
                state |= _vgg_state(_read(config.vgg_weights, config.vgg_sha256, "vgg"))
            _load_lpips(self.lpips, state)
        if config.convnext:
            from torchvision.models import convnext_small

            self.convnext = convnext_small(weights=None)
            self.convnext.load_state_dict(_read(config.convnext_weights, config.convnext_sha256, "convnext"))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Scalar distance of the batches a (with gradient) and b, [B, 3, H, W] each."""
        total = a.new_zeros(())
        if self.lpips is not None:
            total = total + self.config.lpips * self.lpips(a, b).mean()
        if self.convnext is not None:
            logits = [self.convnext(_imagenet(x)) for x in (a, b)]
            total = total + self.config.convnext * F.mse_loss(*logits)
        weight = self.config.lpips + self.config.convnext
        return total / weight if weight else total


def _imagenet(x: Tensor) -> Tensor:
    x = F.interpolate(x, size=224, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def lpips_names() -> list[tuple[str, str]]:
    """(official, ours) module names: official convolutions carry their index in torchvision's VGG-16 `features`."""
    pairs, index = [], 0
    for s, sizes in enumerate(_VGG16):
        for c in range(len(sizes)):
            pairs.append((f"net.slice{s + 1}.{index}", f"features.stages.{s}.{c}"))
            index += 2
        index += 1  # the pooling
        pairs.append((f"lin{s}.model.1", f"heads.{s}"))
    return pairs


def _lpips_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = dict(lpips_names())
    out = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        out[f"{names.get(module, module.removeprefix('scaling_layer'))}.{leaf}".lstrip(".")] = value
    return out


def _vgg_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions of torchvision's VGG-16 under our names; its classifier is not used."""
    names = {a.rpartition(".")[2]: b for a, b in lpips_names() if a.startswith("net.")}
    out = {}
    for key, value in state.items():
        part, index, leaf = (*key.split("."), "", "")[:3]
        if part == "features" and index in names:
            out[f"{names[index]}.{leaf}"] = value
    return out


def _load_lpips(model: LPIPS, state: dict[str, Tensor]) -> None:
    constants = {"shift", "scale"}
    wanted = set(model.state_dict())
    missing, extra = wanted - constants - set(state), set(state) - wanted
    if missing or extra:
        first = sorted(missing or extra)[0]
        hint = "; name torchvision's VGG-16 file as 'vgg_weights'" if first.startswith("features.") and missing else ""
        raise ZooError(f"the LPIPS weights {'lack' if missing else 'hold the unknown'} '{first}'{hint}")
    model.load_state_dict({name: model.state_dict()[name] for name in constants} | state)


def _read(path: str, sha256: str, term: str) -> dict[str, Tensor]:
    if not path:
        raise ZooError(
            f"the perceptual term '{term}' is on but has no '{term}_weights' file; name one or set {term} to 0"
        )
    file = Path(path)
    if not file.is_file():
        raise ZooError(f"the weights of the perceptual term '{term}' are not at {path}")
    if sha256 and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise ZooError(f"{path} is not the file that '{term}_sha256' names")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
