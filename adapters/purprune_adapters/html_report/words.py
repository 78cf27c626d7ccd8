"""Numbers as people read them."""

from __future__ import annotations

from fractions import Fraction

_THIN = "\u202f"
_LARGE = ((10**9, "G"), (10**6, "M"), (10**3, "k"))


def percent(zeros: int, entries: int) -> str:
    """Return a share with one decimal; what is not all and not nothing never reads so.

    >>> [percent(n, 10_000).replace(_THIN, " ") for n in (0, 1, 7999, 9999, 10_000)]
    ['0 %', '< 0.1 %', '80.0 %', '> 99.9 %', '100 %']
    """
    share = Fraction(zeros, entries) if entries else Fraction(0)
    if share in (0, 1):
        return f"{int(share) * 100}{_THIN}%"
    if share < Fraction(5, 10_000):
        return f"< 0.1{_THIN}%"
    if share > 1 - Fraction(5, 10_000):
        return f"> 99.9{_THIN}%"
    return f"{float(share):.1%}".replace("%", f"{_THIN}%")


def short_percent(share: float) -> str:
    """Return a share without superfluous decimals, as for an axis.

    >>> [short_percent(share).replace(_THIN, " ") for share in (0.8, 0.0625, 1)]
    ['80 %', '6.25 %', '100 %']
    """
    return f"{100 * share:.4g}{_THIN}%"


def short(number: float) -> str:
    """Return a number in few digits.

    >>> [short(n).replace(_THIN, " ") for n in (0, 950, 1250, 20_000, 1_250_000)]
    ['0', '950', '1.25 k', '20 k', '1.25 M']
    """
    for size, letter in _LARGE:
        if abs(number) >= size:
            return f"{number / size:.3g}{_THIN}{letter}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Return bytes in decimal units.

    >>> [size(n).replace(_THIN, " ") for n in (950, 20_000, 3_200_000)]
    ['950 B', '20 kB', '3.2 MB']
    """
    text = short(count)
    return f"{text}B" if text[-1].isalpha() else f"{text}{_THIN}B"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "layer"), plural(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
