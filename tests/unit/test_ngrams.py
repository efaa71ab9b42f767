"""n-gram counts against brute force, and drafts that copy."""

from __future__ import annotations

import random

import pytest
import torch

from zoo.generate.engine import GenerateConfig, generate
from zoo.generate.ngrams import CopySession, IndexDraft, InputCopy, NGramIndex
from zoo.generate.noise import Noise
from zoo.models.decoder import Decoder, DecoderConfig

VOCAB, EOS = 5, 99


def corpus() -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(VOCAB) for _ in range(source.randrange(1, 30))] for _ in range(8)]


def counted(documents: list[list[int]], gram: list[int]) -> int:
    return sum(d[i : i + len(gram)] == gram for d in documents for i in range(len(d) - len(gram) + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_counts_are_those_of_a_search(size: int) -> None:
    documents, source = corpus(), random.Random(size)
    index = NGramIndex(documents, EOS)
    for _ in range(60):
        gram = [source.randrange(VOCAB) for _ in range(size)]
        assert index.count(gram) == counted(documents, gram)
        after = index.successors(gram)
        assert sum(after.values()) == index.count(gram)  # a document's end is a successor too
        for token in range(VOCAB):
            assert after.get(token, 0) == counted(documents, [*gram, token])
        longest = max(n for n in range(size + 1) if n == 0 or counted(documents, gram[size - n :]))
        assert index.longest(gram) == longest
    assert index.probability([EOS], 1, order=2) == -1
    assert index.probability([EOS], 1) == pytest.approx(counted(documents, [1]) / len(index.text))


def test_suffixes_are_sorted() -> None:
    index = NGramIndex([[1, 1, 1, 1], [0, 1], []], EOS)
    suffixes = [index.text[i:].tolist() for i in index.suffixes]
    assert suffixes == sorted(suffixes)
    assert index.count([1, 1]) == 3
    assert NGramIndex([], EOS).count([1]) == 0


def test_copies_begin_where_a_tail_is_unique() -> None:
    session = CopySession([5, 6, 7, 5, 8, 9], 2, begun=1)
    assert session.anchor([6]) == 2
    assert session.anchor([5]) == -1  # twice
    assert session.anchor([7, 5]) == 4
    assert session.anchor([1]) == -1
    assert session.propose([0, 6], 2).tokens == [7, 5]
    assert not session.propose([6], 2)  # no output yet


def test_drafts_from_texts_change_nothing() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=VOCAB, init_std=0.4)).double()
    ids = torch.tensor([corpus()[0][:6]])
    cfg = GenerateConfig(max_new_tokens=24)
    plain = generate(model, ids, config=cfg)
    index = NGramIndex([ids[0].tolist() + plain.ids[0].tolist()], EOS)
    drafted = generate(model, ids, config=cfg, draft=IndexDraft(index))
    copied = generate(model, ids, config=cfg, draft=InputCopy(source=plain.ids[0].tolist()))
    assert torch.equal(drafted.ids, plain.ids)
    assert torch.equal(copied.ids, plain.ids)
    assert sum(drafted.stats.accepted) > 0
    assert not IndexDraft(index, least=1000).session([], Noise(0), 9).propose([1, 2], 4)
