"""Exact decoding by bytes: sums over covers against brute force, k-mers, and a SentencePiece model read by hand."""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path

import pytest
import torch

from zoo import tokenizers
from zoo.convert.sentencepiece import SentencePiece
from zoo.errors import ZooError
from zoo.generate.engine import GenerateConfig
from zoo.generate.exact import ByteView, Kmers, generate_bytes
from zoo.models.decoder import Decoder, DecoderConfig
from zoo.models.lm import LM, LMConfig


def decoder(vocab: int, **changes: object) -> Decoder:
    torch.manual_seed(0)
    fields = {"d_model": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_inner": 24, "vocab_size": vocab}
    return Decoder(DecoderConfig(**{**fields, "init_std": 0.5, **changes})).double().eval()


class Merges:
    """BPE over a, b: token 0 is special, then a, b, ab, aba in the order of their merges."""

    pieces = (b"", b"a", b"b", b"ab", b"aba")
    prefix = (0,)

    def canonical(self, text: bytes) -> tuple[int, ...]:
        parts = [bytes([c]) for c in text]
        for piece in self.pieces[3:]:
            i = 0
            while i + 1 < len(parts):
                if parts[i] + parts[i + 1] == piece:
                    parts[i : i + 2] = [piece]
                else:
                    i += 1
        return tuple(self.pieces.index(part) for part in parts)

    def splits(self, text: bytes) -> range:
        return range(len(text) + 1)


@torch.no_grad()
def brute(model: Decoder, units: Merges, text: bytes) -> float:
    """P of all texts that begin with *text*: the sum over covers, found among all sequences of tokens."""
    total = 0.0
    for count in range(1, len(text) + 1):
        for tokens in itertools.product(range(1, len(units.pieces)), repeat=count):
            spelled = b"".join(units.pieces[t] for t in tokens)
            shorter = b"".join(units.pieces[t] for t in tokens[:-1])
            if spelled.startswith(text) and len(shorter) < len(text) and units.canonical(spelled) == tokens:
                logits = model(torch.tensor([[0, *tokens]]))[0].log_softmax(-1)
                total += math.exp(sum(float(logits[i, t]) for i, t in enumerate(tokens)))
    return total


@pytest.mark.parametrize("text", [b"a", b"b", b"ab", b"aba", b"abab", b"baab"])
def test_covers_are_all_encodings_that_begin_with_the_text(text: bytes) -> None:
    model, units = decoder(5), Merges()
    view = ByteView(model, units, 32)
    assert math.exp(view.logprob(text)) == pytest.approx(brute(model, units, text), rel=1e-6)
    # the cache is extended by one text and taken back for the next
    assert math.exp(view.logprob(text + b"a")) == pytest.approx(brute(model, units, text + b"a"), rel=1e-6)
    assert math.exp(view.logprob(b"ba")) == pytest.approx(brute(model, units, b"ba"), rel=1e-6)


def test_the_law_follows_the_canonical_continuations() -> None:
    model, units = decoder(5), Merges()
    law = ByteView(model, units, 32).covers(b"ab")[1]
    with torch.no_grad():
        start, after = model(torch.tensor([[0, 3]]))[0].softmax(-1)
    # the token aba, or after the token ab one of b, ab, aba and the special one; a would be merged with it
    ahead = float(start[4] + start[3] * (after[3] + after[4]))
    mass = {"a": ahead, "b": float(start[3] * after[2]), "stop": float(start[3] * after[0])}
    total = sum(mass.values())
    assert float(law[ord("a")]) == pytest.approx(mass["a"] / total, rel=1e-6)
    assert float(law[ord("b")]) == pytest.approx(mass["b"] / total, rel=1e-6)
    assert float(law.sum()) == pytest.approx(1 - mass["stop"] / total, rel=1e-6)


def kmers() -> Kmers:
    return Kmers(tokenizers.build({"name": "kmer", "bos": False, "align": "left", "k": 3}))


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_bases_over_kmers_multiply_to_the_tokens(mixer: str) -> None:
    torch.manual_seed(1)
    units = kmers()
    vocab = len(units.pieces)
    model = decoder(vocab)
    if mixer == "mamba2":
        options = {"d_state": 8, "head_dim": 8}
        model = LM(LMConfig(d_model=16, n_layer=1, vocab_size=vocab, mixer=mixer, options=options)).double().eval()
    text = b"GATTACA"
    view = ByteView(model, units, 32)
    logs = [float(view.covers(text[:i])[1][text[i]].log()) for i in range(3, 6)]
    a, b = units.canonical(text[:6])
    with torch.no_grad():
        law = model(torch.tensor([[a]]))[0, -1].log_softmax(-1)
    special = sum(math.exp(float(law[t])) for t, piece in enumerate(units.pieces) if not piece)
    # the first base also decides that a k-mer comes, which the later ones know
    assert sum(logs) == pytest.approx(float(law[b]), rel=1e-6)
    assert math.exp(logs[0]) <= 1 - special + 1e-9


def test_generation_continues_inside_a_token_and_is_the_same_in_any_company() -> None:
    units = kmers()
    model = decoder(len(units.pieces))
    cfg = GenerateConfig(max_new_tokens=7, temperature=1.0, seed=3)
    both = generate_bytes(model, units, [b"GATTA", b"ACGTAC"], cfg, seeds=[11, 12])
    assert [len(text) for text in both] == [7, 7]
    assert set(b"".join(both)) <= set(b"ACGT")
    seen: list[tuple[int, int]] = []
    alone = generate_bytes(model, units, [b"ACGTAC"], cfg, seeds=[12], on_byte=lambda *event: seen.append(event))
    assert alone == both[1:]
    assert bytes(byte for _, byte in seen) == alone[0]
    greedy = generate_bytes(model, units, [b"GAT"], GenerateConfig(max_new_tokens=3, ban=tuple(b"T")))[0]
    view = ByteView(model, units, 16)
    law = view.covers(b"GAT")[1]
    law[ord("T")] = 0
    assert greedy[0] == int(law.argmax())
    with pytest.raises(ZooError, match="goes without"):
        generate_bytes(model, units, [b"GAT"], GenerateConfig(block=2))
    with pytest.raises(ZooError, match="no encoding"):
        view.covers(b"GATX")


def message(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece_file(path: Path, normalizer: bytes) -> Path:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in (0xC3, 0xA9, 0x7A))]
    pieces += [("\u2581a", -1.0, 1), ("ab", -2.0, 1), ("\u2581", -3.0, 1), ("a", -4.0, 1), ("b", -5.0, 1)]
    data = b""
    for name, score, kind in pieces:
        data += message(1, message(1, name.encode()) + b"\x15" + struct.pack("<f", score) + message(3, kind))
    path.write_bytes(data + message(2, message(3, 2)) + message(3, normalizer))
    return path


def test_sentencepiece_by_hand(tmp_path: Path) -> None:
    units = SentencePiece(sentencepiece_file(tmp_path / "m.model", message(1, b"identity") + message(4, 0)), (1,))
    assert units.pieces[:3] == [b"", b"", b"\xc3"]
    text = units.text(b"ab ab")
    assert text == "\u2581ab\u2581ab".encode()
    assert units.canonical(text) == (5, 9, 5, 9)  # the better merge first, and never across a space
    assert units.canonical("z\u00e9".encode()) == (4, 2, 3)  # byte fallback
    assert units.canonical(b"z\xc3") == (4, 2)  # an unfinished character
    assert units.canonical(b"z\xc3" + text) is None
    assert units.canonical(b"\xa9") is None
    with pytest.raises(ZooError, match="rewrites"):
        SentencePiece(sentencepiece_file(tmp_path / "n.model", message(1, b"nfkc")))
