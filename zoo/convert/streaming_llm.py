"""StreamingLLM (mit-han-lab/streaming-llm) against its parity cases: Llama under the sinks-and-recents rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.common import check_round_trip
from zoo.convert.llama import config_fields, to_official, to_zoo
from zoo.convert.parity import Case
from zoo.generate.policies import StreamingLLM
from zoo.generate.target import ModelTarget
from zoo.models.decoder import Decoder, DecoderConfig
from zoo.nn.policy import CachePolicy, PolicyState


def tiny_llama(case: Case) -> Decoder:
    """The case's Llama with its weights, converted there and back."""
    fields = config_fields({**case.config["llama"], "class": "LlamaForCausalLM"}, case.system)
    config = DecoderConfig(**{**fields, "max_len": None})
    state = {name: tensor for name, tensor in case.state.items() if not name.endswith("rotary_emb.inv_freq")}
    ours = to_zoo(state, config, case.system)
    check_round_trip(to_official(ours, config, what=case.system), state, case.system)
    model = Decoder(config)
    model.load_state_dict(ours)
    return model.eval()


def passes(model: Decoder, ids: Tensor, first: int, policy: CachePolicy | None) -> Any:
    """Run the first tokens, then one at a time: yields logits [n, V] and the layers' states after each pass."""
    target = ModelTarget(model, 1, ids.shape[1], policy)
    for start, end in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        yield target.append(ids[:, start:end])[0], target.state.layers


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Logits, cache sizes and the final caches (keys before rotation)."""
    config, ids = case.config, case.inputs["input_ids"]
    policy = StreamingLLM(int(config["start_size"]), int(config["recent_size"]))
    logits, sizes, layers = [], [], []
    for new, layers in passes(tiny_llama(case), ids, int(config.get("prefill", 1)), policy):
        logits.append(new)
        sizes.append(layers[0].length)
    first, last = layers[0], layers[-1]
    assert isinstance(first, PolicyState)
    assert isinstance(last, PolicyState)
    return {
        "logits": torch.cat(logits),
        "cache_len": torch.tensor(sizes),
        "final_k_layer0": first.k[:, :, : first.length],
        "final_k_last": last.k[:, :, : last.length],
        "final_v_last": last.v[:, :, : last.length],
    }
