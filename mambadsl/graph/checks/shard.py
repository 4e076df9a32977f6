"""One device's part of a layer under tensor parallelism, and the offsets that kernels can reach in it."""

from __future__ import annotations

from mambadsl.kinds.values import Values

#: The largest offset of kernels that count elements in 32 bits.
MAX_OFFSET = 2**31 - 1


def mamba2_shard(f: Values, tp: int) -> Values | None:
    """The fields of one of `tp` parts; a single group is copied. None where heads or groups do not divide
    (E201, E202 say so)."""
    if f.heads % tp or (f.groups % tp and f.groups != 1):
        return None
    return f.replace(heads=f.heads // tp, groups=max(1, f.groups // tp))
