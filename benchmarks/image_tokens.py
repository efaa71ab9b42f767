"""Image tokens at full size with random weights: ratios from one run.

    python benchmarks/image_tokens.py [--small] [--threads 2] [--clock wall|cpu] [--only PART,...]

On a machine that others use, `--threads 1 --clock cpu` measures what wall clock cannot. `--only` measures some parts
and leaves the results of the others as they stand; both sides of a ratio always come from one run.

1. TiTok S-128 and B-64, pixels -> ids -> pixels, against the same blocks written with torch.nn.MultiheadAttention in
   the length-first layout of the official code and convolutions on channels-first tensors (same weights, outputs
   compared).
2. FlexTok d12 encode against the same stack with one dense mask for all tokens.
3. MaskGIT in 8 steps against autoregressive decoding (RAR) of as many tokens by blocks of the same size, both guided.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _bench import RESULTS, interleaved, save

from zoo import catalogue
from zoo.config import from_dict
from zoo.generate.autoregressive_image import generate_rar
from zoo.generate.maskgit import MaskGITSampling, maskgit
from zoo.models.flextok import FlexTok, FlexTokConfig
from zoo.models.maskgit import MaskGIT, MaskGITConfig
from zoo.models.rar import RAR, RARConfig, rar_vit
from zoo.models.titok import TiTok, TiTokConfig
from zoo.nn import conv2d
from zoo.nn.vit import Mask, ViT


class PlainBlock(nn.Module):
    """A pre-norm block around torch.nn.MultiheadAttention, [L, B, D], with the weights of one of ours."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        width = ours.attn.qkv.in_features
        self.norm1, self.norm2, self.mlp = ours.norm1, ours.norm2, nn.Sequential(ours.mlp.fc1, nn.GELU(), ours.mlp.fc2)
        self.attn = nn.MultiheadAttention(width, ours.attn.heads)
        self.attn.in_proj_weight, self.attn.in_proj_bias = ours.attn.qkv.weight, ours.attn.qkv.bias
        self.attn.out_proj.weight, self.attn.out_proj.bias = ours.attn.out_proj.weight, ours.attn.out_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """The stack, for batch-first callers."""

    def __init__(self, ours: ViT) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(PlainBlock(block) for block in ours.blocks))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.blocks(x.transpose(0, 1)).transpose(0, 1)


PARTS = ("titok-s128", "titok-b64", "flextok", "generators-32", "generators-128")


def measure(fns: dict[str, Any], clock: str, least: int = 3) -> dict[str, float]:
    """Milliseconds of each by wall clock or processor time: the best of *least* calls in each of two rounds."""
    return {name: pair[clock == "cpu"] for name, pair in interleaved(fns, budget=0.0, least=least).items()}


def titok(name: str, clock: str) -> dict[str, float]:
    """Encode and decode one picture with our blocks and with the plain ones."""
    model = TiTok(from_dict(TiTokConfig, catalogue.ENTRIES[name].config)).eval()
    pixels = torch.rand(1, 3, 256, 256)
    ids = model.encode(pixels)
    parts = [(side, side.transformer, PlainViT(side.transformer).eval()) for side in (model.encoder, model.decoder)]

    def with_blocks(plain: bool, call: Any) -> Any:
        for side, ours, theirs in parts:
            side.transformer = theirs if plain else ours
        with patch.object(conv2d, "fast_layout", (lambda x: x) if plain else conv2d.fast_layout):
            return call()

    gap = (with_blocks(False, lambda: model.decode(ids)) - with_blocks(True, lambda: model.decode(ids))).abs().max()
    assert gap < 1e-3, gap
    times = measure(
        {
            f"{kind} {what}": lambda plain=kind == "plain", call=call: with_blocks(plain, call)
            for kind in ("zoo", "plain")
            for what, call in (("encode", lambda: model.encode(pixels)), ("decode", lambda: model.decode(ids)))
        },
        clock,
    )
    out = {f"{name} {key} ms": wall for key, wall in times.items()}
    total = {kind: sum(times[f"{kind} {what}"] for what in ("encode", "decode")) for kind in ("zoo", "plain")}
    return out | {f"{name} speed-up": total["plain"] / total["zoo"]}


def flextok(layers: int, clock: str) -> dict[str, float]:
    """FlexTok's encoder on VAE latents; the plain form gives every token the same dense mask."""
    base = FlexTokConfig()
    config = replace(base, encoder=replace(base.encoder, layers=layers), decoder=replace(base.decoder, layers=1))
    model = FlexTok(config).eval()
    latents = torch.randn(1, 16, 32, 32)
    n, k = 256, config.registers
    seen = torch.ones(n + k, n + k, dtype=torch.bool).tril()
    seen[:n, :n] = True
    x = model.encoder.pack(latents)
    ours, dense = Mask("prefix", prefix=n), Mask("dense", dense=seen)
    transformer = model.encoder.transformer
    assert torch.allclose(transformer(x, ours), transformer(x, dense), atol=1e-3)
    times = measure({"zoo": lambda: transformer(x, ours), "dense": lambda: transformer(x, dense)}, clock)
    return {
        f"flextok d{layers} encode ms": times["zoo"],
        f"flextok d{layers} encode, dense mask ms": times["dense"],
        f"flextok d{layers} speed-up": times["dense"] / times["zoo"],
    }


def generators(layers: int, tokens: int, clock: str) -> dict[str, float]:
    """Guided generation of one picture's tokens: 8 parallel steps against one step a token."""
    base = MaskGITConfig(length=tokens)
    bert = MaskGIT(replace(base, vit=replace(base.vit, layers=layers))).eval()
    rar = RAR(RARConfig(codes=4096, length=tokens, vit=rar_vit(768, layers, 16, 3072))).eval()
    label, none = torch.tensor([1]), torch.tensor([bert.dropped])
    sampling = MaskGITSampling(steps=8)
    times = measure(
        {
            "maskgit": lambda: maskgit(
                lambda ids, u: bert(ids, none if u else label), 1, tokens, bert.mask_id, sampling, torch.rand
            ),
            "rar": lambda: generate_rar(rar, label, guidance=4.0),
        },
        clock,
        least=1,
    )
    return {
        f"maskgit {tokens} tokens ms": times["maskgit"],
        f"rar {tokens} tokens ms": times["rar"],
        f"maskgit speed-up over rar, {tokens} tokens": times["rar"] / times["maskgit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer layers: a check that the script works")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: dict[str, float] = {}
    with torch.inference_mode():
        for part in args.only.split(","):
            if part.startswith("titok"):
                results |= {} if args.small else titok(part, args.clock)
            elif part == "flextok":
                results |= flextok(2 if args.small else 12, args.clock)
            else:
                tokens = 8 if args.small else int(part.removeprefix("generators-"))
                results |= generators(2 if args.small else 24, tokens, args.clock)
    for key, value in results.items():
        print(f"{key:45} {value:10.2f}")
    if not args.small:
        file = RESULTS / "image_tokens.json"
        rows = json.loads(file.read_text())["rows"] if file.is_file() and args.only != ",".join(PARTS) else []
        known = {row["what"]: row["value"] for row in rows} | {k: round(v, 3) for k, v in results.items()}
        rows = [{"what": what, "value": value} for what, value in known.items()]
        save("image_tokens", rows, threads=args.threads, clock=args.clock)


if __name__ == "__main__":
    main()
