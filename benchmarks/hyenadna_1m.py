"""Inference over a million bases with hyenadna-large-1m (8 blocks of width 256) on two cores: time and peak memory.

    python benchmarks/hyenadna_1m.py [--length 1000000] [--threads 2] [--fasta FILE]

Random bases unless a FASTA file is given. Prints seconds, bases a second, peak resident memory, and the mean negative
log-likelihood in bits a base; the limit is 12 GiB. Writes results/hyenadna_1m.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from zoo import catalogue
from zoo.config import from_dict
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

RESULTS = Path(__file__).parent / "results"
LIMIT_GIB = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fasta", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    entry = catalogue.ENTRIES["hyenadna-large-1m"]
    model = HyenaDNA(from_dict(HyenaDNAConfig, entry.config)).eval()
    if args.fasta:
        lines = args.fasta.read_text().splitlines()
        text = "".join(line for line in lines if not line.startswith(">")).upper()[: args.length]
        code = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}
        ids = torch.tensor([[code.get(base, 6) for base in text]])
    else:
        ids = torch.randint(7, 11, (1, args.length))
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(ids)
        nll = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bits = float(nll) / 0.6931471805599453
    print(
        f"{ids.shape[1]} bases, {sum(p.numel() for p in model.parameters())} parameters, {args.threads} threads: "
        f"{seconds:.1f} s, {ids.shape[1] / seconds:.0f} bases/s, peak {peak:.2f} GiB (limit {LIMIT_GIB}), "
        f"{bits:.3f} bits a base (untrained)"
    )
    assert torch.isfinite(logits).all()
    RESULTS.mkdir(exist_ok=True)
    result = {"bases": ids.shape[1], "threads": args.threads, "seconds": seconds, "peak_gib": peak, "bits": bits}
    (RESULTS / "hyenadna_1m.json").write_text(json.dumps(result, indent=1) + "\n")
    if peak > LIMIT_GIB:
        raise SystemExit(f"peak memory {peak:.2f} GiB exceeds {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
