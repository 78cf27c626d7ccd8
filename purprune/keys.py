"""Keys: scores read as integers that order alike, and NaN found on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

_MAGNITUDE = {np.dtype(word): word(np.iinfo(word).max) for word in (np.int16, np.int32, np.int64)}
"""All bits of a float but its sign."""

_GOLDEN = 0x9E3779B97F4A7C15
"""The golden section of 2**64. Its multiples modulo 2**64 fall evenly: a sample without a stride
that data could follow."""


def spread_evenly(size: int, over: int) -> NDArray[np.int64]:
    """Return the positions of a sample, from 0 to ``over`` - 1; some may come twice."""
    fractions = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) >> np.uint64(32)
    at: NDArray[np.int64] = (fractions * 2.0**-32 * over).astype(np.int64)
    return at


class NotANumberError(Exception):
    """A score is NaN."""


class KeyMaker(NamedTuple):
    """Turns bits of scores into keys that order alike, and finds NaN on the way."""

    absolute: bool
    infinity: int | None
    """The bits of infinity; None where the scores are integers."""

    def __call__(self, bits: Keys, out: Keys) -> Keys:
        """Write the keys to ``out``, which is not ``bits``; extremes of its type never occur."""
        if self.infinity is None:
            np.copyto(out, bits)
            return np.absolute(out, out=out) if self.absolute else out
        np.bitwise_and(bits, _MAGNITUDE[out.dtype], out=out)
        if out.size and np.maximum.reduce(out, axis=None) > self.infinity:
            raise NotANumberError
        if not self.absolute:  # put the sign back, as a two's complement one
            sign = bits >> (8 * out.itemsize - 1)
            np.bitwise_xor(out, sign, out=out)
            np.subtract(out, sign, out=out)
        return out

    @property
    def has_sign_free(self) -> bool:
        """Whether no key is negative, so that the sign can tell what was pruned before."""
        return self.absolute and self.infinity is not None

    def put_first(self, keys: Keys, kept: Bools) -> Keys:
        """Put what was not kept below all else; by the sign it stays in order among itself."""
        pruned = ~kept
        if self.has_sign_free:
            bits = 8 * keys.itemsize
            sign = np.left_shift(pruned.view(np.int8), bits - 1, dtype=keys.dtype)
            return np.bitwise_or(keys, sign, out=keys)
        np.copyto(keys, np.iinfo(keys.dtype).min, where=pruned)
        return keys
