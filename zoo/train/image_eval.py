"""Measuring visual tokenizers and image generators: PSNR, SSIM, codebook use, LPIPS, rFID, gFID, IS.

Pictures are prepared as the model's config says, clamped and cut to 8 bits by truncation before anything is measured
(TiTok's protocol). FID and IS need a feature extractor, which is never downloaded; with any but the Inception network
of the published numbers they are called not comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, nearest
from zoo.models.visual import VisualModel, to_uint8
from zoo.nn.codebook import codebook_usage
from zoo.nn.image_metrics import fid, inception_score, psnr, ssim
from zoo.nn.perceptual import PerceptualConfig, PerceptualLoss

FEW = 10_000  # below that many pictures FID is dominated by its bias
EXTRACTORS = ("inception_v3", "convnext_small", "resnet18", "resnet50", "vgg16")


@dataclass(frozen=True)
class Extractor:
    """A network whose features and class logits FID and IS are made of.

    Attributes:
        name: architecture, sha256 of its weights: what a report must say.
        size: side of its input in pixels.
        net: [B, 3, size, size] normalised -> (features [B, D], logits [B, C]).
    """

    name: str
    size: int
    net: Callable[[Tensor], tuple[Tensor, Tensor]]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> features and logits."""
        x = pixels.float() / 255
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.net((x - mean) / std)


def open_extractor(spec: str, sha256: str = "") -> Extractor:
    """The extractor `NAME:FILE`, a network of torchvision with a file of its weights.

    Raises:
        ZooError: not of that form, an unknown network, a missing or changed file, weights that do not fit.
    """
    name, _, path = spec.partition(":")
    if name not in EXTRACTORS:
        raise ZooError(f"unknown feature extractor '{name}'" + nearest(name, EXTRACTORS))
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise ZooError(f"the extractor takes a file of weights, as in {name}:weights.pth; '{path}' does not exist")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 and digest != sha256:
        raise ZooError(f"'{path}' has sha256 {digest}, not the expected {sha256}")
    from torchvision import models

    state = _state(file)
    options: dict[str, Any] = {"weights": None}
    if name == "inception_v3":
        options |= {"transform_input": False, "init_weights": False, "aux_logits": any("AuxLogits" in k for k in state)}
    last = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2][-1:]
    if last:
        options["num_classes"] = len(last[0])
    model = getattr(models, name)(**options).eval()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ZooError(f"'{path}' does not fit {name}: {str(error).splitlines()[-1].strip()}") from None
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return Extractor(f"{name}, weights sha256 {digest[:12]}", 299 if name == "inception_v3" else 224, _Tap(model, head))


class _Tap:
    """A classifier that also gives what its last linear layer reads."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.model = model
        self.seen: list[Tensor] = []
        head.register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.clear()
        logits = self.model(x)
        return self.seen[0], logits


def _state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Report:
    """Numbers and how they came about.

    Attributes:
        title: says whether the numbers can be set beside published ones.
        metrics: by name.
        protocol: lines to print with them.
    """

    title: str
    metrics: dict[str, float]
    protocol: tuple[str, ...]


@torch.no_grad()
def reconstruction_report(
    model: VisualModel,
    batches: Iterable[Tensor],
    decode: Callable[[Tensor], Tensor],
    *,
    tokens: int = 0,
    extractor: Extractor | None = None,
    perceptual: PerceptualConfig | None = None,
) -> Report:
    """PSNR, SSIM and codebook use of *model* on pictures; LPIPS and rFID where their networks are given.

    Args:
        model: encodes.
        batches: pixels [B, 3, S, S] in [0, 1].
        decode: ids [B, k] -> pixels.
        tokens: use only the first of the ids, 0 all.
        extractor: of rFID.
        perceptual: weights of LPIPS.

    Raises:
        ZooError: no picture, or LPIPS weights that cannot be read.
    """
    lpips = PerceptualLoss(perceptual) if perceptual is not None else None
    sums: dict[str, list[Tensor]] = {}
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    seen: list[Tensor] = []
    for pixels in batches:
        ids = model.encode(pixels)
        ids = ids[:, :tokens] if tokens else ids
        seen.append(ids.cpu())
        pair = [to_uint8(pixels), to_uint8(decode(ids))]
        real, fake = (x.float() / 255 for x in pair)
        sums.setdefault("psnr", []).append(psnr(fake, real).cpu())
        if real.shape[-1] >= 11:
            sums.setdefault("ssim", []).append(ssim(fake, real).cpu())
        if lpips is not None and lpips.lpips is not None:
            sums.setdefault("lpips", []).append(lpips.lpips(fake, real).flatten().double().cpu())
        if extractor is not None:
            for kept, x in zip(features, pair, strict=True):
                kept.append(extractor(x)[0].cpu())
    if not seen:
        raise ZooError("there is no picture to measure")
    metrics = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    assert model.vocab_size is not None
    metrics |= {f"code_{name}": v for name, v in codebook_usage(torch.cat(seen), model.vocab_size).items()}
    count = sum(len(part) for part in seen)
    if extractor is not None:
        metrics["rfid"] = fid(torch.cat(features[0]), torch.cat(features[1]))
    rounding = "compared in 8 bits, by truncation; means over pictures"
    return _report(model.config.preprocess, metrics, count, extractor, [rounding])


@torch.no_grad()
def generation_report(
    real: Iterable[Tensor], fake: Iterable[Tensor], extractor: Extractor, preprocess: Any, how: str = ""
) -> Report:
    """gFID of generated pictures against real ones (both [B, 3, S, S] in [0, 1]), and their Inception score."""
    real_features = torch.cat([extractor(to_uint8(x))[0] for x in real])
    parts = [extractor(to_uint8(x)) for x in fake]
    features, logits = (torch.cat(list(x)) for x in zip(*parts, strict=True))
    metrics = {"gfid": fid(real_features, features), "is": inception_score(logits)}
    lines = [f"{len(features)} generated pictures against {len(real_features)} real ones", *([how] if how else [])]
    return _report(preprocess, metrics, min(len(features), len(real_features)), extractor, lines)


def _report(p: Any, metrics: dict[str, float], count: int, extractor: Extractor | None, more: list[str]) -> Report:
    title = f"{count:,} pictures of {p.size} pixels"
    lines = [f"pictures: {_preparation(p)}", *more]
    if extractor is not None:
        title += ", FID and IS NOT COMPARABLE with published ones"
        lines.append(f"features: torchvision's {extractor.name}; published numbers use TensorFlow's Inception of 2015")
        if count < FEW:
            lines.append(f"FID of {count:,} pictures is biased upwards; published ones take 50,000")
    return Report(title, metrics, tuple(lines))


def _preparation(p: Any) -> str:
    how = {"shorter": f"shorter side to {p.size}, {p.kernel}, cut from the centre", "none": "cut from the centre"}
    return how.get(p.resize, f"squeezed to {p.size} x {p.size}, {p.kernel}")
