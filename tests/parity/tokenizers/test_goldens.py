"""Every vector of the official tokenizers, string for string."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.tokenizers.bpe import BpeTokenizer, BpeTokenizerConfig
from zoo.tokenizers.char import CharTokenizer, CharTokenizerConfig
from zoo.tokenizers.kmer import KmerTokenizer, KmerTokenizerConfig

HERE = Path(__file__).parent
CHAR = json.loads((HERE.parent / "cases" / "hyenadna" / "tokenizer" / "char.json").read_text())
KMER = json.loads((HERE / "kmer6.json").read_text())


def char(variant: str) -> CharTokenizer:
    if variant.startswith("standalone"):
        return CharTokenizer(CharTokenizerConfig(template="cls_sep"))
    return CharTokenizer(CharTokenizerConfig(literals=variant.startswith("hf_port")))


@pytest.mark.parametrize("variant", sorted(CHAR["variants"]))
def test_char(variant: str) -> None:
    golden, tokenizer = CHAR["variants"][variant], char(variant)
    assert dict(zip(tokenizer.vocab, range(12), strict=True)) == CHAR["vocab"]
    for case in golden["cases"]:
        text = case["text"]
        assert tokenizer.encode(text, add_special=False).tolist() == case["no_special"], text
        assert tokenizer.encode(text).tolist() == case["with_special"], text
        assert tokenizer.tokens(case["no_special"]) == case["tokens"], text
        assert tokenizer.decode(case["no_special"]) == case["decode"], text
        assert len(tokenizer.offsets(text)) == len(case["with_special"])
    texts = [case["text"] for case in golden["cases"]]
    ids, valid = tokenizer.encode_batch(texts)
    for row, mask, case in zip(ids, valid, golden["cases"], strict=True):
        assert row[mask].tolist() == case["with_special"]
        assert (row[~mask] == 4).all()
        assert not mask[: len(mask) - mask.sum()].any()  # left padding is the default
    assert tokenizer.encode_pair("ACGT", "TTTT")[0].tolist() == golden["pair"]["input_ids"]


@pytest.mark.parametrize("variant", sorted(CHAR["variants"]))
def test_char_padding_and_truncation(variant: str) -> None:
    golden, tokenizer = CHAR["variants"][variant], char(variant)

    def check(name: str, ids: np.ndarray, valid: np.ndarray) -> None:
        if name in golden:  # the -hf variant has fewer of them
            want = golden[name]
            assert ids.tolist() == np.atleast_2d(want["input_ids"]).tolist(), name
            if "attention_mask" in want:
                assert valid.astype(int).tolist() == np.atleast_2d(want["attention_mask"]).tolist(), name

    check("pad_left_max10_special", *tokenizer.encode_batch(["ACGT"], 10, pad_to=10))
    check("pad_left_max10_nospecial", *tokenizer.encode_batch(["ACGT"], 10, pad_to=10, add_special=False))
    check("trunc_max4_special", *tokenizer.encode_batch(["ACGTACGT"], 4, truncate="right"))
    check("trunc_max4_nospecial", *tokenizer.encode_batch(["ACGTACGT"], 4, truncate="right", add_special=False))
    check("batch_longest_left", *tokenizer.encode_batch(["ACGT", "ACGTACGT"]))
    check("batch_longest_right", *tokenizer.encode_batch(["ACGT", "ACGTACGT"], pad_side="right"))
    if "special_ids" in golden:
        for role, value in golden["special_ids"].items():
            assert tokenizer.special[role.split("_")[0]] == value
        assert tokenizer.vocab_size == golden["vocab_size"]


def test_kmer() -> None:
    tokenizer = KmerTokenizer()
    assert tokenizer.vocab_size == 4128
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in KMER["cases"]:
            text = case["text"]
            assert tokenizer.encode(text, add_special=False).tolist() == case["ids"], text
            assert tokenizer.tokens(case["ids"]) == case["tokens"], text
            assert tokenizer.decode(case["ids"]) == case["decoded"], text
            assert tokenizer.decode(case["ids"], skip_special=True) == case["decoded_skip_special"], text
            spans = tokenizer.offsets(text, add_special=False)
            assert len(spans) == len(case["ids"])
            for (start, end), token in zip(spans, case["tokens"], strict=True):
                assert token == "<oov>" or text[start:end] == token
        ids, valid = tokenizer.encode_batch([case["text"] for case in KMER["cases"]], add_special=False)
        for row, mask, case in zip(ids, valid, KMER["cases"], strict=True):
            assert row[mask].tolist() == case["ids"], case["text"]
        for vector in KMER["add_special_tokens_true"]["vectors"]:
            assert tokenizer.encode(vector["text"]).tolist() == vector["ids"]
        for side in ("left", "right"):
            golden = KMER[f"batch_{side}_pad"]
            ids, valid = tokenizer.encode_batch(golden["texts"], pad_side=side, add_special=False)
            assert ids.tolist() == golden["input_ids"]
            assert valid.astype(int).tolist() == golden["attention_mask"]


def test_kmer_vocabulary_is_the_published_file() -> None:
    import hashlib

    text = "".join(f"{token} {i}\n" for i, token in enumerate(KmerTokenizer().vocab))
    digests = {hashlib.sha256(body.encode()).hexdigest() for body in (text, text.rstrip("\n"))}
    assert KMER["source"]["vocab_txt_sha256"].split()[0] in digests


def test_kmer_truncation_sides() -> None:
    tokenizer = KmerTokenizer(KmerTokenizerConfig(end="bos"))
    text = "<s>" + "ACGTAC" * 8 + "<s>"
    for side in ("right", "left"):
        ids, _ = tokenizer.encode_batch([text], 5, add_special=False, truncate=side)
        assert ids[0].tolist() == KMER[f"truncate_{side}_max5"]


def bpe_case(shared: Path, system: str) -> tuple[dict[str, Any], BpeTokenizer]:
    folder = shared / "goldens" / system
    golden = json.loads(next((folder / "tokenizer").glob("*.json")).read_text())
    roles = (
        {"cls": "[CLS]", "sep": "[SEP]"} if system == "dnabert2" else {"bos": "[BOS]", "eos": "[EOS]", "sep": "[SEP]"}
    )
    return golden, BpeTokenizer(BpeTokenizerConfig(file=str(folder / "tokenizer.json"), **roles))


@pytest.mark.parametrize("system", ["dnabert2", "metagene"])
def test_bpe(shared: Path, system: str) -> None:
    golden, tokenizer = bpe_case(shared, system)
    assert tokenizer.vocab_size == golden["vocab_size"]
    for case in golden["cases"]:
        text = case["text"]
        assert tokenizer.encode(text).tolist() == case["ids"], text
        assert tokenizer.encode(text, add_special=False).tolist() == case["ids_no_special"], text
        assert tokenizer.tokens(case["ids"]) == case["tokens"], text
        assert tokenizer.offsets(text).tolist() == case["offsets"], text
        assert tokenizer.decode(case["ids"], skip_special=True) == case["decode_skip_special"], text
        assert tokenizer.decode(case["ids"]) == case["decode_keep"], text
    ids, valid = tokenizer.encode_batch([case["text"] for case in golden["cases"]])
    for row, mask, case in zip(ids, valid, golden["cases"], strict=True):
        assert row[mask].tolist() == case["ids"]
    for pair in golden["pairs"]:
        ids, kinds = tokenizer.encode_pair(pair["a"], pair["b"])
        assert ids.tolist() == pair["ids"]
        assert kinds.tolist() == pair["type_ids"]
