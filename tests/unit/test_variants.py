"""Windows around alleles, masked tokens of byte-pair vocabularies, and the published variant score of GENERator."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.convert.generator import config_from_official, to_zoo
from zoo.convert.parity import Case
from zoo.hub.artifact import Artifact
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config
from zoo.models.generator import GENERator
from zoo.tokenizers import build
from zoo.tokenizers.bpe import train as train_bpe
from zoo.train.haplotypes import Contig, Site, cut
from zoo.train.masked_marginals import masked_spans
from zoo.train.variants import VariantScorer


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("equal", [True, False])
def test_windows_hold_the_allele_and_its_surroundings(step: int, equal: bool) -> None:
    """Exhaustive over places, allele lengths and window lengths of short contigs."""
    text = "".join(random.Random(0).choice("ACGT") for _ in range(24)).encode()
    contig = Contig.of("c", text)
    for start, size, alt, length in product(range(24), (1, 2, 4), (b"", b"T", b"GGG", b"CATG"), (8, 9, 12, 18, 60)):
        if start + size > len(text) or max(size, len(alt)) > length // 2:
            continue
        site = Site(contig, start, text[start : start + size], (alt,))
        found = cut(site, site.alts, length, step, equal)
        for one, allele in zip(found, (site.ref, alt), strict=True):
            whole = text[:start] + allele + text[start + size :]
            assert one.text[one.at : one.at + one.size] == allele
            place = start - one.at
            assert whole[place : place + len(one.text)] == one.text
            assert len(one.text) % step == 0
            assert len(one.text) <= length
            flipped = one.flipped()
            assert (
                flipped.text[flipped.at : flipped.at + one.size]
                == allele.translate(bytes.maketrans(b"ACGT", b"TGCA"))[::-1]
            )
        lengths = {len(one.text) for one in found}
        if equal and length // step * step + 4 <= len(text):
            assert lengths == {length // step * step}
        if not equal and step == 1:
            assert found[0].text[: found[0].at] == found[1].text[: found[1].at]
            behind = [one.text[one.at + one.size :] for one in found]
            assert behind[0] == behind[1]


def test_published_variant_score(root: Path) -> None:
    """The official script's scores, from the same contexts laid out as a genome; and on the other strand."""
    case = Case(root / "tests" / "parity" / "cases" / "generator" / "dev-lm")
    model = GENERator(config_from_official(case.config))
    model.load_state_dict(to_zoo(case.state, model.config))
    found = Artifact(model.eval(), build({"name": "kmer"}), case.path, {})
    expected = case.outputs["vep_score"]
    for strand in ("+", "-"):
        sites = []
        for text, (ref, alt) in zip(case.meta["sequences"], case.meta["ref_alt"], strict=True):
            whole, alleles = (text + ref + "ACGTAC").encode(), [ref.encode(), alt.encode()]
            place = len(text)
            if strand == "-":
                table = bytes.maketrans(b"ACGT", b"TGCA")
                whole, place = whole.translate(table)[::-1], len(whole) - 1 - place
                alleles = [allele.translate(table) for allele in alleles]
            sites.append(Site(Contig.of("c", whole), place, alleles[0], (alleles[1],)))
        scores = VariantScorer(found, "upstream", strand=strand)(sites)
        mine = torch.tensor([row[0].score for row in scores])
        torch.testing.assert_close(mine, expected.float(), rtol=1e-3, atol=1e-4)


def test_masked_tokens_of_a_byte_pair_vocabulary(tmp_path: Path) -> None:
    """Whatever re-tokenising changes is masked: the context of both alleles is the same tokens."""
    draw = random.Random(1)
    texts = ["".join(draw.choice("ACGT") for _ in range(200)) for _ in range(20)]
    train_bpe(texts, 200, tmp_path / "tokenizer.json")
    tokenizer = build({"name": "bpe", "cls": "[CLS]", "sep": "[SEP]"}, tmp_path)
    torch.manual_seed(0)
    config = DNABERT2Config(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=tokenizer.vocab_size)
    found = Artifact(DNABERT2(config).eval(), tokenizer, tmp_path, {})
    scorer = VariantScorer(found, window=80)
    assert scorer.method == "masked_marginal"
    contig = Contig.of("c", texts[0].encode())
    for start in range(0, 196):
        ref = texts[0][start].encode()
        for alt in (b"A" if ref != b"A" else b"C", ref + b"GT"):
            site = Site(contig, start, ref, (alt,))
            one, two = cut(site, site.alts, 80, 1, equal=False)
            ids = [tokenizer.encode(hap.text) for hap in (one, two)]
            spans = masked_spans(scorer.reader, ids[0], one, ids[1], two)
            (a, b), (c, d) = spans
            assert np.array_equal(ids[0][:a], ids[1][:c])
            assert np.array_equal(ids[0][b:], ids[1][d:])
            for hap, (low, high) in zip((one, two), spans, strict=True):
                covered = tokenizer.offsets(hap.text)[low:high]
                assert covered[0, 0] <= hap.at
                assert covered[-1, 1] >= hap.at + hap.size
    effect = scorer([Site(contig, 100, texts[0][100].encode(), (b"ACC",))])[0][0]
    assert effect.score == pytest.approx(effect.alt - effect.ref)  # type: ignore[operator]
