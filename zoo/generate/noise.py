"""Random numbers of a sequence: a pure function of its seed and a counter, whatever else is in the batch."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser: 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Noise:
    """A stream of uniform numbers in [0, 1) with 53 random bits.

    Attributes:
        seed: names the stream.
        counter: numbers drawn so far.
    """

    def __init__(self, seed: int, counter: int = 0) -> None:
        self.seed = seed
        self.counter = counter
        self._key = mix(seed & _MASK)

    def uniform(self) -> float:
        """The next number."""
        self.counter += 1
        return (mix(self._key ^ mix(self.counter)) >> 11) / (1 << 53)

    def fork(self, name: int) -> Noise:
        """An independent stream, for a draft that must not disturb this one."""
        return Noise(mix(self._key ^ mix(name ^ 0x5DEECE66D)))
