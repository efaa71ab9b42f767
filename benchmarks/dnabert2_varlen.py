"""DNABERT-2 117M on a batch of unlike lengths, against transformers' BERT of the same size padded to the longest.

    python benchmarks/dnabert2_varlen.py [--threads 2] [--batch 16] [--low 20] [--high 250] [--batches 4] [--repeats 5]

Needs `transformers`. Both get the same random token ids and give hidden states without gradients in float32; BERT
uses SDPA attention. Its feed-forward network is 4608 wide, so that it has the parameters that DNABERT-2's gated one
has (with BERT-base's own 3072 it is smaller; that ratio is given too). The lengths are drawn anew for each of the
batches, and each time is the least of the repeats, the models taking turns. The packed outputs are checked against
those of a sequence alone and of the same model padded with a dense mask, which is timed too. Writes
results/dnabert2_varlen.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zoo.models.base import SequenceModel
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.nn import attention, masks
from zoo.nn.layout import Layout

RESULTS = Path(__file__).parent / "results"
TARGET = 1.5


def bert(width: int) -> torch.nn.Module:
    """transformers' BERT-base over DNABERT-2's vocabulary with a feed-forward network of *width*."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=4096, intermediate_size=width, attn_implementation="sdpa")
    return BertModel(config, add_pooling_layer=False).eval()


def padded(model: DNABERT2, ids: Tensor, valid: Tensor) -> Tensor:
    """The same model the ordinary way: every row as long as the longest, one dense bias."""
    attention.attend = masks.attend_dense
    try:
        return SequenceModel.forward_features(model, ids, Layout("full", valid=valid))[0]
    finally:
        attention.attend = masks.attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--low", type=int, default=20)
    parser.add_argument("--high", type=int, default=250)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = DNABERT2(DNABERT2Config()).eval()
    size = sum(p.numel() for p in model.parameters())
    peers = {"bert_same_size": bert(4608), "bert_base_3072": bert(3072)}
    totals: dict[str, float] = {}
    tokens = cells = 0
    with torch.inference_mode():
        for _ in range(args.batches):
            lengths = torch.randint(args.low, args.high + 1, (args.batch,))
            valid = torch.arange(int(lengths.max())) < lengths[:, None]
            ids = torch.randint(5, 4096, valid.shape).masked_fill(~valid, 3)
            mask = valid.long()
            runs: dict[str, Callable[[], object]] = {
                "ours": lambda ids=ids, valid=valid: model.forward_features(ids, Layout("full", valid=valid)),
                **{
                    name: lambda peer=peer, ids=ids, mask=mask: peer(input_ids=ids, attention_mask=mask)
                    for name, peer in peers.items()
                },
                "ours_padded": lambda ids=ids, valid=valid: padded(model, ids, valid),
            }
            best = dict.fromkeys(runs, float("inf"))
            for turn in range(args.repeats + 1):  # the first warms up
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if turn:
                        best[name] = min(best[name], time.perf_counter() - start)
            for name, seconds in best.items():
                totals[name] = totals.get(name, 0.0) + seconds
            tokens, cells = tokens + int(lengths.sum()), cells + valid.numel()
            hidden = model.forward_features(ids, Layout("full", valid=valid))[0]
            row = int(lengths.argmin())
            alone = model.forward_features(ids[row : row + 1, : lengths[row]])[0][0]
            torch.testing.assert_close(hidden[row, : lengths[row]], alone, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(hidden, padded(model, ids, valid) * valid[..., None], rtol=1e-3, atol=1e-4)
    sizes = {name: sum(p.numel() for p in peer.parameters()) for name, peer in peers.items()}
    print(f"DNABERT-2: {size} parameters, {sizes}; {tokens} real tokens of {cells} padded ones; {args.threads} threads")
    for name, seconds in totals.items():
        print(f"{name:16s} {1000 * seconds / args.batches:8.1f} ms a batch   {seconds / totals['ours']:.2f} x ours")
    ratio = totals["bert_same_size"] / totals["ours"]
    print(f"ratio {ratio:.2f} (target {TARGET})")
    RESULTS.mkdir(exist_ok=True)
    result = {"parameters": size, "peers": sizes, "tokens": tokens, "padded_tokens": cells, **vars(args)}
    result |= {"seconds": totals, "ratio": ratio, "ratio_bert_base": totals["bert_base_3072"] / totals["ours"]}
    (RESULTS / "dnabert2_varlen.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
