"""SentencePiece BPE models (`tokenizer.model`) without the library: pieces, scores, and the canonical encoding."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterator
from pathlib import Path

from zoo.errors import ZooError

_SPACE = "\u2581"
_NORMAL, _DEFINED, _BYTE = 1, 4, 6


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol-buffer message."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = number() if kind == 2 else 8 if kind == 1 else 4
        yield key >> 3, data[place : place + size]
        place += size


class SentencePiece:
    """A BPE model with byte fallback. Spaces are the three bytes of U+2581 throughout.

    Attributes:
        pieces: bytes of each token; empty for special ones.
        prefix: tokens before every text.

    Raises:
        ZooError: another kind of model, or one that rewrites its text.
    """

    def __init__(self, file: Path, prefix: tuple[int, ...] = ()) -> None:
        self.prefix = prefix
        self.pieces: list[bytes] = []
        self._score: dict[str, float] = {}
        self._index: dict[str, int] = {}
        self._bytes: dict[int, int] = {}
        self.dummy_prefix = True
        for number, value in _fields(file.read_bytes()):
            if isinstance(value, int):
                continue
            if number == 1:
                self._piece(dict(_fields(value)))
            elif number == 2 and dict(_fields(value)).get(3, 1) != 2:
                raise ZooError(f"{file.name} is no BPE model of SentencePiece")
            elif number == 3:
                normalizer = dict(_fields(value))
                if normalizer.get(2) or normalizer.get(4, 1):
                    raise ZooError(f"{file.name} rewrites its text (normalizer); only `identity` without is read")
                self.dummy_prefix = bool(normalizer.get(3, 1))
        self._memo: dict[bytes, tuple[int, ...] | None] = {}

    def _piece(self, fields: dict[int, int | bytes]) -> None:
        name, kind = bytes(fields[1]).decode(), fields.get(3, _NORMAL)
        place = len(self.pieces)
        if kind == _BYTE:
            value = int(name[3:5], 16)
            self._bytes[value] = place
            self.pieces.append(bytes([value]))
        elif kind in (_NORMAL, _DEFINED):
            self._index[name] = place
            self._score[name] = struct.unpack("<f", bytes(fields.get(2, b"\0\0\0\0")))[0]
            self.pieces.append(name.encode())
        else:
            self.pieces.append(b"")

    def text(self, raw: bytes) -> bytes:
        """*raw* as the tokens spell it: escaped spaces, and one before it."""
        spelled = raw.decode().replace(" ", _SPACE)
        return (_SPACE + spelled if self.dummy_prefix and spelled else spelled).encode()

    def splits(self, text: bytes) -> range:
        """A token has no space but at its beginning, so the last one begins at the last space or later."""
        return range(max(0, text.rfind(_SPACE.encode())), len(text) + 1)

    def canonical(self, text: bytes) -> tuple[int, ...] | None:
        """Tokens of *text*, word by word; the bytes of an unfinished last character stand for themselves."""
        tokens: list[int] = []
        start = 0
        while start < len(text):
            stop = text.find(_SPACE.encode(), start + 1)
            stop = len(text) if stop < 0 else stop
            word = text[start:stop]
            if word not in self._memo:
                self._memo[word] = self._word(word)
            found = self._memo[word]
            if found is None or (stop < len(text) and not _complete(word)):
                return None
            tokens += found
            start = stop
        return tuple(tokens)

    def _word(self, word: bytes) -> tuple[int, ...] | None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            letters = decoder.decode(word)
        except UnicodeDecodeError:
            return None
        if " " in letters:  # spelled with U+2581
            return None
        rest = word[len(letters.encode()) :]
        symbols = list(letters)
        while True:
            best, place = None, -1
            for i in range(len(symbols) - 1):
                score = self._score.get(symbols[i] + symbols[i + 1])
                if score is not None and (best is None or score > best):
                    best, place = score, i
            if place < 0:
                break
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        tokens: list[int] = []
        for symbol in symbols:
            if symbol in self._index:
                tokens.append(self._index[symbol])
            elif all(byte in self._bytes for byte in symbol.encode()):
                tokens += [self._bytes[byte] for byte in symbol.encode()]
            else:
                return None
        if any(byte not in self._bytes for byte in rest):
            return None
        return (*tokens, *(self._bytes[byte] for byte in rest))


def _complete(word: bytes) -> bool:
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True
