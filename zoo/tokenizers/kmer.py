"""k-mer tokenizer with GENERator's vocabulary and rules, as arithmetic on arrays of bases."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.errors import ZooError
from zoo.tokenizers.base import Ids, Text, Tokenizer, to_bytes

OTHER, SINGLE, BREAK, INSIDE = 64, 65, 66, 67  # byte classes beyond the alphabet's digits
SPECIALS = (
    "<oov> <s> </s> <pad> <mask> <bog> <eog> <bok> <eok> <+> <-> <cds> <pseudo> <tRNA> <rRNA> <ncRNA> <miscRNA> <mam> "
    "<vrt> <inv> <pln> <fng> <prt> <arc> <bct> <mit> <plt> <plm> <vir> <sp0> <sp1> <sp2>"
)
REGISTERED = 5  # the first five are special tokens to `decode`; the others are words of the vocabulary


@config
class KmerTokenizerConfig:
    """Options whose defaults give the ids of the official GENERator tokenizer.

    Attributes:
        k: bases a token.
        alphabet: the bases in digit order; token id = number of special tokens + the k-mer read in base 4.
        specials: special tokens in id order, separated by blanks; the first five are <oov> <s> </s> <pad> <mask>.
        bos: put <s> before a text when special tokens are added.
        end: what is put behind it: nothing, `eos` (</s>, official fine-tuning of the language model) or `bos`
            (<s>, official classification).
        align: what happens to the 1 to k-1 letters that a run of letters has too many for whole tokens. `warn`
            gives the official ids (the tail is one <oov>) and a warning; `left` counts tokens from the left end and
            `right` from the right end, so that the tail is at the other end; `error` refuses.
        tail: with align left or right, `trim` drops the tail and `pad` completes it with the first letter of the
            alphabet (official: generation trims or pads on the left, fine-tuning on the right).
        lower: lower case: `unk` as the official code (one <oov> a letter), or `upper` to read it as upper case.
        u: the RNA letter U: `unk`, or `t` to read it as T.
        pad_side: side padded by default.
    """

    k: int = 6
    alphabet: str = "ATCG"
    specials: str = SPECIALS
    bos: bool = True
    end: Literal["none", "eos", "bos"] = "none"
    align: Literal["warn", "left", "right", "error"] = "warn"
    tail: Literal["trim", "pad"] = "trim"
    lower: Literal["unk", "upper"] = "unk"
    u: Literal["unk", "t"] = "unk"
    pad_side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        letters = self.alphabet
        if not letters.isalpha() or not letters.isascii() or letters != letters.upper():
            raise ValueError(f"alphabet must be upper-case letters, got '{letters}'")
        if not 2 <= len(set(letters)) == len(letters):
            raise ValueError(f"alphabet must be at least two different letters, got '{letters}'")
        if self.k < 1 or len(letters) ** self.k > 2**26:
            raise ValueError(f"k must be at least 1 and give at most 2**26 tokens, got {self.k}")
        if len(set(self.specials.split())) != len(self.specials.split()) or len(self.specials.split()) < 5:
            raise ValueError("specials must be at least five different tokens")
        if self.u == "t" and "T" not in letters:
            raise ValueError("u=t needs the letter T in the alphabet")


class KmerTokenizer(Tokenizer):
    """<oov>=0 <s>=1 </s>=2 <pad>=3 <mask>=4 ... AAAAAA=32 ... TTTTTT=1397 ... GGGGGG=4127 with the defaults.

    A text is read from the left as special tokens, runs of upper-case letters and single other characters. A run is
    cut into k-mers; a k-mer with a letter outside the alphabet, and each other character, is one <oov>.
    """

    name: ClassVar[str] = "kmer"
    Config = KmerTokenizerConfig

    def __init__(self, config: KmerTokenizerConfig | None = None, base: Path | None = None) -> None:
        self.config = config or KmerTokenizerConfig()
        self.k = self.config.k
        names = self.config.specials.split()
        self.first = len(names)  # id of the k-mer made of the alphabet's first letter
        self.vocab = [*names, *map("".join, itertools.product(self.config.alphabet, repeat=self.k))]
        self.special = {"unk": 0, "bos": 1, "eos": 2, "pad": 3, "mask": 4}
        self.hidden = frozenset(range(REGISTERED))
        self.pad_side = self.config.pad_side
        self.prefix = (1,) if self.config.bos else ()
        self.suffix = {"none": (), "eos": (2,), "bos": (1,)}[self.config.end]
        self._names = {token.encode(): i for i, token in enumerate(names)}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._literal = re.compile(b"|".join(map(re.escape, longest_first)))
        self._opening = bytes({token[0] for token in self._names})
        self._table = self._make_table()
        self._radix = len(self.config.alphabet)

    def _make_table(self) -> bytes:
        table = bytearray([SINGLE] * 256)
        for code in range(ord("A"), ord("Z") + 1):
            table[code] = OTHER
        for digit, letter in enumerate(self.config.alphabet):
            table[ord(letter)] = digit
        if self.config.u == "t" and "U" not in self.config.alphabet:
            table[ord("U")] = table[ord("T")]
        if self.config.lower == "upper":
            for code in range(ord("A"), ord("Z") + 1):
                table[code + 32] = table[code]
        return bytes(table)

    def sequence(self, ids: object) -> str:
        marks = self.first
        return "".join(self.tokens(int(i) for i in ids if int(i) >= marks))  # type: ignore[attr-defined]

    def encode_windows(self, windows: NDArray[np.uint8]) -> tuple[Ids, NDArray[np.bool_]]:
        rows, letters = windows.shape
        if letters % self.k == 0:  # fixed-length windows of plain bases: one pass, no bookkeeping
            digits = np.frombuffer(windows.tobytes().translate(self._table), np.uint8)
            if not len(digits) or digits.max() <= OTHER:
                ids = self._numbers(digits.reshape(-1, self.k)).reshape(rows, letters // self.k)
                return ids, np.ones(ids.shape, np.bool_)
        return super().encode_windows(windows)

    def flat_ids(self, texts: Sequence[Text]) -> tuple[Ids, Ids]:
        parts = [to_bytes(text) for text in texts]
        ids, _, _, counts = self._parse(parts, spans=False)
        return ids, counts

    def _spans(self, text: Text) -> NDArray[np.int64]:
        _, start, end, _ = self._parse([to_bytes(text)], spans=True)
        return np.stack([start, end], 1)

    def _numbers(self, digits: NDArray[np.uint8]) -> Ids:
        """Ids of k-mers given as digits [T, k]; one <oov> where a digit is none of the alphabet."""
        value = np.zeros(len(digits), np.int32)
        for j in range(self.k):
            value *= self._radix
            value += digits[:, j]
        ids = value.astype(np.int64) + self.first
        if digits.size and digits.max() >= OTHER:
            ids[(digits >= OTHER).any(1)] = 0
        return ids

    def _parse(self, parts: list[bytes], spans: bool) -> tuple[Ids, Ids, Ids, Ids]:
        """Ids, starts, ends (in the joined text) of all tokens, and the number of tokens of each part."""
        joined = b"".join(parts)
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        digits = np.frombuffer(joined.translate(self._table), np.uint8)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        plain = not len(digits) or digits.max() <= OTHER
        if plain and len(parts) == 1 and len(digits) % self.k == 0 and not spans:
            ids = self._numbers(digits.reshape(-1, self.k))
            return ids, ids, ids, np.array([len(ids)], np.int64)
        if plain:
            run_start, run_end = bounds[:-1][lengths > 0], bounds[1:][lengths > 0]
            lone_start = lone_end = lone_id = np.empty(0, np.int64)
        else:
            digits = digits.copy()
            lone_start, lone_end, lone_id = self._lone(joined, digits)
            run_start, run_end = _runs(digits <= OTHER, bounds)
        ids, start, end = self._kmers(digits, run_start, run_end)
        if len(lone_start):
            ids = np.concatenate([ids, lone_id])
            start, end = np.concatenate([start, lone_start]), np.concatenate([end, lone_end])
            order = np.argsort(start, kind="stable")
            ids, start, end = ids[order], start[order], end[order]
        edges = np.searchsorted(start, bounds, "left")
        return ids, start, end, np.diff(edges).astype(np.int64)

    def _lone(self, joined: bytes, digits: NDArray[np.uint8]) -> tuple[Ids, Ids, Ids]:
        """Tokens that are no k-mer: special tokens in the text, which are marked in *digits*, and other characters."""
        start, end, ids = [], [], []
        if any(opening in joined for opening in (bytes([byte]) for byte in self._opening)):
            for match in self._literal.finditer(joined):
                start.append(match.start())
                end.append(match.end())
                ids.append(self._names[match.group()])
                digits[match.start() : match.end()] = INSIDE
        single = np.flatnonzero(digits == SINGLE)
        starts = np.concatenate([np.array(start, np.int64), single])
        ends = np.concatenate([np.array(end, np.int64), single + 1])
        return starts, ends, np.concatenate([np.array(ids, np.int64), np.zeros(len(single), np.int64)])

    def _kmers(self, digits: NDArray[np.uint8], run_start: Ids, run_end: Ids) -> tuple[Ids, Ids, Ids]:
        """Ids, starts and ends of the k-mers of the runs of letters, tails treated as `align` and `tail` say."""
        k, align, pad = self.k, self.config.align, self.config.tail == "pad"
        over = (run_end - run_start) % k
        tails = bool(over.any())
        if tails and align == "error":
            row = int(over.argmax())
            length = int(run_end[row] - run_start[row])
            raise ZooError(
                f"a run of {length} letters is no multiple of k={k}: {int(over[row])} letters are left over; "
                "trim or pad the sequence, or set the tokenizer's align to left or right"
            )
        if tails and align == "warn":
            warnings.warn(
                f"a tail of {int(over.max())} letters became one <oov> token; set the tokenizer's align to left or "
                "right to keep whole k-mers",
                stacklevel=6,
            )
        kept_tail = align == "warn" or pad
        count = (run_end - run_start) // k + ((over > 0) if kept_tail else 0)
        first = run_start
        if tails and align == "right":
            first = run_start + np.where(over > 0, over - (k if pad else 0), 0)  # may lie before the run: padding
        before = np.cumsum(count) - count
        start = np.repeat(first - before * k, count) + k * np.arange(int(count.sum()))
        ids = self._at(digits, start, len(digits))
        end = start + k
        if tails and kept_tail:
            which = np.flatnonzero(over > 0)
            token = before[which] + (0 if align == "right" else count[which] - 1)
            if align == "warn":
                ids[token] = 0
            else:
                ids[token] = self._padded(digits, start[token], run_start[which], run_end[which])
            low, high = run_start[which], run_end[which]
            start[token], end[token] = np.maximum(start[token], low), np.minimum(end[token], high)
        return ids, start, end

    def _at(self, digits: NDArray[np.uint8], start: Ids, size: int) -> Ids:
        """Ids of the k-mers that begin at *start*; those that leave the array are set later."""
        value = np.zeros(len(start), np.int32)
        worst = np.zeros(len(start), np.uint8)
        inside = len(start) > 0 and bool(start[0] >= 0 and start[-1] + self.k <= size)
        contiguous = inside and bool((np.diff(start) == self.k).all())
        if contiguous:
            return self._numbers(digits[start[0] : start[-1] + self.k].reshape(-1, self.k))
        for j in range(self.k):
            digit = digits.take(start + j, mode="clip") if size else np.zeros(len(start), np.uint8)
            value = value * self._radix + digit
            np.maximum(worst, digit, out=worst)
        ids = value.astype(np.int64) + self.first
        ids[worst >= OTHER] = 0
        return ids

    def _padded(self, digits: NDArray[np.uint8], start: Ids, low: Ids, high: Ids) -> Ids:
        place = start[:, None] + np.arange(self.k)
        inside = (place >= low[:, None]) & (place < high[:, None])
        return self._numbers(np.where(inside, digits.take(place, mode="clip"), 0).astype(np.uint8))


def _runs(letters: NDArray[np.bool_], bounds: Ids) -> tuple[Ids, Ids]:
    """Start and end of each run of True, cut at the text boundaries *bounds*."""
    edge = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    cuts = np.unique(np.concatenate([edge, bounds]))
    start, end = cuts[:-1], cuts[1:]
    keep = letters[start]
    return start[keep], end[keep]
