"""The decoding engine: every kind of state, prompts of unlike length, samplers, stop rules, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.draft import TokenTable
from zoo.generate.engine import GenerateConfig, generate
from zoo.generate.lean import LeanDecoder
from zoo.generate.target import ModelTarget
from zoo.models.decoder import Decoder, DecoderConfig, LayerAt
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig, MixerAt
from zoo.models.lm import LM, LMConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.positions import RotaryConfig

VOCAB = 23


def decoder(**changes: Any) -> Decoder:
    fields = {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 48, "vocab_size": VOCAB}
    return Decoder(DecoderConfig(**{**fields, "init_std": 0.3, **changes}))


def lm(mixer: str, **options: Any) -> LM:
    mlp = MLPConfig(kind="gelu", width=48)
    max_len = {"max_len": 96} if "max_len" in options else {}
    return LM(LMConfig(d_model=32, vocab_size=VOCAB, mixer=mixer, options=options, mlp=mlp, init_std=0.3, **max_len))


MODELS = {
    "gqa": lambda: decoder(),
    "mha": lambda: decoder(n_kv_head=0, rope=None),
    "bias": lambda: decoder(bias=True, rope=RotaryConfig(base=500.0)),
    "window": lambda: decoder(window=6),
    "alibi": lambda: lm("attention", heads=4, alibi=True),
    "qk_norm": lambda: lm("attention", heads=4, qk_norm=True, rope={"interleaved": True}),
    "sinks": lambda: lm("attention", heads=4, window=5, sinks=2),
    "mixed_spans": lambda: decoder(hybrid=(LayerAt(layers=(0,), options={"window": 4}),)),
    "learned": lambda: LM(
        LMConfig(d_model=32, vocab_size=VOCAB, mixer="attention", options={"heads": 4}, positions="learned",
                 max_len=96, init_std=0.3, mlp=MLPConfig(width=48))
    ),
    "hyena": lambda: HyenaDNA(HyenaDNAConfig(d_model=32, vocab_size=VOCAB, max_len=96, init_std=0.3)),
    "hyena_hybrid": lambda: HyenaDNA(
        HyenaDNAConfig(
            d_model=32, vocab_size=VOCAB, max_len=96, init_std=0.3,
            hybrid=(MixerAt(layers=(1,), mixer="attention", options={"heads": 4}),),
        )
    ),
    "mamba2": lambda: lm("mamba2", d_state=8, head_dim=8),
    "s4d": lambda: lm("s4d"),
    "s4": lambda: lm("s4"),
    "h3": lambda: lm("h3", d_state=8),
    "based": lambda: lm("based", num_heads=2, feature_dim=8),
    "baseconv": lambda: lm("baseconv"),
    "decoder_mamba2": lambda: decoder(
        hybrid=(LayerAt(layers=(1,), mixer="mamba2", options={"d_state": 8, "head_dim": 8}),)
    ),
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(3)
    return MODELS[name]().eval()


def prompts(batch: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Prompts of unlike length, padded on the left, on the right and not at all."""
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, (batch, length), generator=source)
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, 6:] = False
    return ids, valid


@torch.no_grad()
def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that runs the whole sequence again for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :VOCAB].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_recomputing(name: str) -> None:
    model = make(name)
    ids, valid = prompts()
    out = generate(model, ids, valid, GenerateConfig(max_new_tokens=12))
    for i in range(3):
        assert out.ids[i].tolist() == recomputed(model, ids[i][valid[i]].tolist(), 12)
    plain = generate(model, ids[2:], config=GenerateConfig(max_new_tokens=12, prefill_chunk=4))
    assert torch.equal(plain.ids, out.ids[2:])
    assert out.stats.forwards == 12
    assert out.stats.tokens == 36


@pytest.mark.parametrize("name", MODELS)
def test_drafts_change_nothing_about_greedy_output(name: str) -> None:
    model = make(name)
    ids, valid = prompts()
    want = generate(model, ids, valid, GenerateConfig(max_new_tokens=24))
    table = TokenTable(VOCAB)
    for _ in range(2):  # the second time the table knows the successors
        got = generate(model, ids, valid, GenerateConfig(max_new_tokens=24), draft=table)
        assert torch.equal(got.ids, want.ids)
        assert torch.allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert sum(got.stats.accepted) > 0, "no guess was ever right"


def test_copied_weights_give_the_models_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.backends.mkldnn.is_available()
    for name in ("gqa", "mha", "bias"):
        model = make(name)
        for rows in (1, 3):
            logits = {}
            for copy in (True, False):
                with torch.inference_mode():
                    target = ModelTarget(model, rows, 32, lean=copy, passes=64)
                    ids = prompts(3)[0][:rows]
                    target.prefill(ids)
                    parts = [target.step(ids[:, :1])]
                    if copy:
                        assert target.lean is not None
                        matrix = target.lean.layers[0].mlp.both
                        assert (matrix.packed is not None) == (blocks and rows > 1)
                    parts.append(target.tree(ids[:, :2], torch.tensor([[-1, 0]]).expand(rows, -1))[:, -1])
                    target.commit(torch.zeros(rows, 1, dtype=torch.long))
                    parts.append(target.step(ids[:, 2:3]))  # single rows read whichever copy there is
                    assert not copy or matrix.packed is None or matrix.columns is None, "one copy is enough"
                    logits[copy] = torch.stack(parts)
            assert torch.allclose(logits[True], logits[False], atol=2e-5), name
    assert ModelTarget(model, 2, 32, passes=63).lean.head.copy is False
    monkeypatch.setattr("zoo.generate.target._ROOM", 1000)
    assert ModelTarget(model, 2, 32, passes=64).lean.head.copy is False


def test_the_lean_pass_is_the_models_own() -> None:
    fits = [name for name in MODELS if LeanDecoder.fits(make(name))]
    assert {"gqa", "mha", "bias"} <= set(fits)
    assert not {"window", "alibi", "qk_norm", "mamba2", "learned", "hyena", "mixed_spans"} & set(fits)
    for name in fits:
        model = make(name).double()
        for tree in (False, True):
            logits = []
            for lean in (True, False):
                with torch.inference_mode():
                    target = ModelTarget(model, 2, 32, lean=lean, passes=100 if tree else 0)
                    ids, valid = prompts(2)
                    target.prefill(ids, valid)
                    assert (target.lean is not None) == lean
                    if tree:
                        parent = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])
                        logits.append(target.tree(ids[:, :4], parent))
                        target.commit(torch.tensor([[0, 2, -1], [0, 1, 2]]))
                    logits.append(target.step(ids[:, 4:5]))
            half = len(logits) // 2
            for a, b in zip(logits[:half], logits[half:], strict=True):
                assert torch.allclose(a, b, atol=1e-10)


def test_sequences_are_the_same_in_any_batch() -> None:
    model = make("gqa").double()
    ids, valid = prompts()
    cfg = GenerateConfig(max_new_tokens=10, temperature=0.9, top_k=15, top_p=0.95, min_p=0.01, num_return_sequences=2)
    together = generate(model, ids, valid, cfg, seeds=[4, 5, 6, 7, 8, 9])
    for i in range(3):
        alone = generate(model, ids[i : i + 1], valid[i : i + 1], cfg, seeds=[4 + 2 * i, 5 + 2 * i])
        assert torch.equal(alone.ids, together.ids[2 * i : 2 * i + 2])
    assert not torch.equal(together.ids[0], together.ids[1])
    again = generate(model, ids, valid, GenerateConfig(max_new_tokens=10, temperature=0.9, seed=1))
    same = generate(model, ids, valid, GenerateConfig(max_new_tokens=10, temperature=0.9, seed=1))
    other = generate(model, ids, valid, GenerateConfig(max_new_tokens=10, temperature=0.9, seed=2))
    assert torch.equal(again.ids, same.ids)
    assert not torch.equal(again.ids, other.ids)


def test_stop_rules_bans_and_lengths() -> None:
    model = make("gqa")
    ids, valid = prompts()
    free = generate(model, ids, valid, GenerateConfig(max_new_tokens=12))
    stop = int(free.ids[1, 5])
    first = [row.tolist().index(stop) + 1 if stop in row else 12 for row in free.ids]
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    cfg = GenerateConfig(max_new_tokens=12, stop=(stop,), pad_id=1)
    out = generate(model, ids, valid, cfg, on_tokens=lambda row, tokens: told[row].extend(tokens))
    assert out.lengths.tolist() == first
    for i in range(3):
        assert out.ids[i, : first[i]].tolist() == free.ids[i, : first[i]].tolist() == told[i]
        assert (out.ids[i, first[i] :] == 1).all()
        assert (out.logprobs[i, first[i] :] == 0).all()
    run = tuple(free.ids[0, 2:4].tolist())
    out = generate(model, ids[:1], valid[:1], GenerateConfig(max_new_tokens=12, stop_sequences=(run,)))
    assert tuple(out.ids[0, -2:].tolist()) == run
    out = generate(model, ids, valid, GenerateConfig(max_new_tokens=12), stop=[lambda tokens: len(tokens) == 3])
    assert out.lengths.tolist() == [3, 3, 3]
    out = generate(model, ids, valid, GenerateConfig(max_new_tokens=12, ban=tuple(range(10)), temperature=1.5))
    assert int(out.ids.min()) >= 10
    out = generate(model, ids, valid, GenerateConfig(max_new_tokens=6, min_new_tokens=4, stop=tuple(range(VOCAB - 1))))
    assert out.ids[:, :4].unique().tolist() == [VOCAB - 1]
    assert out.lengths.tolist() == [5 if token != VOCAB - 1 else 6 for token in out.ids[:, 4].tolist()]


def test_repetition_counts_the_prompt_and_drafts() -> None:
    model = make("gqa")
    ids, valid = prompts()
    cfg = GenerateConfig(max_new_tokens=13, repetition=2.5)
    want = generate(model, ids, valid, cfg)
    for i in range(3):
        line = ids[i][valid[i]].tolist()
        for token in want.ids[i].tolist():
            with torch.no_grad():
                logits = model(torch.tensor([line]))[0, -1]
            for seen in set(line):
                logits[seen] = logits[seen] / 2.5 if logits[seen] > 0 else logits[seen] * 2.5
            assert token == int(logits.argmax())
            line.append(token)
    assert not torch.equal(want.ids, generate(model, ids, valid, GenerateConfig(max_new_tokens=13)).ids)
    got = generate(model, ids, valid, cfg, draft=TokenTable(VOCAB))
    assert torch.equal(got.ids, want.ids)


def test_guidance_mixes_two_prompts() -> None:
    model = make("gqa").double()
    ids = prompts()[0]
    negative = ids[:, 5:]
    one = generate(model, ids, config=GenerateConfig(max_new_tokens=6), negative=negative)
    assert torch.equal(one.ids, generate(model, ids, config=GenerateConfig(max_new_tokens=6)).ids)
    zero = generate(model, ids, config=GenerateConfig(max_new_tokens=6, guidance=0.0), negative=negative)
    assert torch.equal(zero.ids, generate(model, negative, config=GenerateConfig(max_new_tokens=6)).ids)
    cfg = GenerateConfig(max_new_tokens=5, guidance=3.0, guidance_schedule="linear")
    out = generate(model, ids, config=cfg, negative=negative)
    line: list[int] = []
    with torch.no_grad():
        for step in range(5):
            tail = torch.tensor([line], dtype=torch.long)
            a = model(torch.cat([ids[:1], tail], 1))[0, -1]
            b = model(torch.cat([negative[:1], tail], 1))[0, -1]
            line.append(int((b + 3.0 * step / 5 * (a - b)).argmax()))
    assert out.ids[0].tolist() == line


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_drafts_change_nothing_under_guidance(schedule: str) -> None:
    model, table = make("gqa").double(), TokenTable(VOCAB)
    ids, valid = prompts()
    fields = {"max_new_tokens": 12, "guidance": 2.5, "guidance_schedule": schedule, "num_return_sequences": 2}
    cfg = GenerateConfig(**fields)
    plain = generate(model, ids, valid, cfg, negative=ids[:, 4:])
    for _ in range(2):  # the table has learned by the second time
        drafted = generate(model, ids, valid, cfg, negative=ids[:, 4:], draft=table)
        assert torch.equal(drafted.ids, plain.ids)
        torch.testing.assert_close(drafted.logprobs, plain.logprobs)
    assert sum(drafted.stats.accepted) > 0


def test_blocks_see_themselves_and_the_past() -> None:
    model = make("gqa").double()
    ids = prompts(2, 8)[0]
    out = generate(model, ids, config=GenerateConfig(max_new_tokens=11, block=4, num_return_sequences=2))
    assert out.lengths.tolist() == [11] * 4
    assert torch.equal(out.ids[0], out.ids[1])
    line = ids
    from zoo.nn.layout import Layout

    with torch.no_grad():
        for _ in range(3):
            block = torch.arange(line.shape[1]) // 4
            hidden, _ = model.backbone(model.embed(line), Layout("block_causal", block=block))
            line = torch.cat([line, model.forward_head(hidden)[:, -4:].argmax(-1)], 1)
    assert torch.equal(out.ids[::2], line[:, 8:19])
    with pytest.raises(ZooError, match="multiple"):
        generate(model, ids[:, :7], config=GenerateConfig(block=4))


def test_refusals_are_one_clear_sentence() -> None:
    model = make("hyena")
    ids = prompts()[0]
    with pytest.raises(ZooError, match=r"9 \+ 90 tokens"):
        generate(model, ids, config=GenerateConfig(max_new_tokens=90))
    with pytest.raises(ZooError, match="seeds"):
        generate(model, ids, seeds=[1])
    with pytest.raises(ZooError, match="negative"):
        generate(model, ids, config=GenerateConfig(guidance=2.0))
    with pytest.raises(ZooError, match="a draft under guidance"):
        generate(model, ids, draft=TokenTable(VOCAB), negative=ids)
    with pytest.raises(ZooError, match="a draft and block > 1 cannot"):
        generate(model, ids, config=GenerateConfig(block=3), draft=TokenTable(VOCAB))
    model.reset_head(2)
    with pytest.raises(ZooError, match="language-model head"):
        generate(model, ids)
