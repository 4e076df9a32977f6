"""The nearest legal values, for help lines: divisors, multiples, and whatever else a rule allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isqrt

#: Divisors of larger numbers are found only in pairs with one below this, so that no input takes long.
MAX_TRIAL = 100_000


def divisors(n: int) -> list[int]:
    """All divisors, ascending (of n above 10^10: those that are, or have a partner, below 100,000)."""
    low = [d for d in range(1, min(isqrt(n), MAX_TRIAL) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def divisors_near(n: int, to: int, *, most: int = 8) -> list[int]:
    """All divisors of n where there are few, else those nearest to `to`; ascending."""
    return sorted(sorted(divisors(n), key=lambda d: (abs(d - to), d))[:most])


def multiples_near(value: int, of: int) -> list[int]:
    """The multiples just below and above, without 0."""
    below = value // of * of
    return [m for m in (below, below + of) if m > 0 and m != value]


def near(value: int, legal: Callable[[int], bool], *, reach: int = 256) -> list[int]:
    """The nearest legal whole numbers of at least 1, below and above, if any within reach."""
    below = next((v for v in range(value - 1, max(0, value - reach), -1) if legal(v)), None)
    above = next((v for v in range(value + 1, value + reach + 1) if legal(v)), None)
    return [v for v in (below, above) if v is not None]


def listed(items: Iterable[object], *, word: str = "and") -> str:
    """`1, 2 and 4`"""
    texts = [f"{item:,}" if isinstance(item, int) and item >= 10**5 else str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}"


def divide(n: int, to: int) -> str:
    """`1, 2, 4 and 8 divide 8`"""
    found = divisors_near(n, to)
    return f"{listed(found)} {'divides' if len(found) == 1 else 'divide'} {n}"


def settings(name: str, values: Iterable[int]) -> str:
    """`heads=8 or heads=16`"""
    return listed((f"`{name}={value}`" for value in values), word="or")
