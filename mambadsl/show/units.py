"""Numbers for people: three digits and a unit. Exact values are in the JSON outputs."""

from __future__ import annotations

_COUNTS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
_FLOPS = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(n: int) -> str:
    """Parameters, tokens: `8.10 B`, `131 K`, `12`."""
    return _scaled(n, _COUNTS, "")


def layers(n: int) -> str:
    """`52 layers`, `1 layer`."""
    return f"{n:,} layer{'s' * (n != 1)}"


def flops(n: float) -> str:
    """Floating-point operations: `16.2 G`."""
    return _scaled(n, _FLOPS, "")


def size(n: int) -> str:
    """Bytes in powers of 1024: `21.3 MiB`, `4 KiB`, `96 B`."""
    return _scaled(n, _BYTES, "B", exact=True)


def percent(part: float, whole: float) -> str:
    """`12.5%`; nothing of nothing is `0%`."""
    share = 100 * part / whole if whole else 0.0
    return "0%" if share == 0 else "<0.1%" if share < 0.05 else f"{share:.1f}%"


def _scaled(n: float, units: tuple[tuple[int, str], ...], rest: str, *, exact: bool = False) -> str:
    for scale, unit in units:
        value = n / scale
        if value >= 0.9995:
            whole = exact and n % scale == 0
            return f"{n // scale} {unit}" if whole and value < 1000 else f"{_digits(value)} {unit}"
    return f"{round(n)} {rest}".rstrip() if n else "0"


def _digits(value: float) -> str:
    for decimals, below in ((2, 9.995), (1, 99.95)):
        if value < below:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"
