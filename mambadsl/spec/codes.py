"""Diagnostics of names and patterns, raised by `resolve` and `unroll`."""

from __future__ import annotations

from mambadsl.spec.files import E032  # noqa: F401
from mambadsl.spec.scope import E025  # noqa: F401
from mambadsl.text.diagnostic import declare

MAX_LAYERS = 10_000
MAX_DEPTH = 64
MAX_BRANCHES = 64

E020 = declare(
    "E020",
    "an unknown layer",
    """
    A name that starts upper case is a layer: declared by `layer` or `shared` in this file, imported, or
    one of `std.mdl` (`M A F E S`). Layers are separated by spaces: `M M M A`, not `MMMA`.
    """,
)
E021 = declare(
    "E021",
    "an unknown kind",
    """
    A lower-case word with parentheses in a pattern or a `layer` line is a kind: `mamba2(...)`,
    `attention(...)`. `mambadsl explain kinds` lists them.
    """,
)
E026 = declare(
    "E026",
    "a statement stands twice",
    """
    A file has at most one `model`, one `stack` and one `mtp`, and one `parts` block of each name.
    """,
)
E027 = declare(
    "E027",
    "an imported name does not exist",
    """
    `from "f.mdl" import A` takes `A` from f.mdl, which must declare it: a layer or a constant.
    """,
)
E028 = declare(
    "E028",
    "an unknown part set or slot",
    """
    `parts NAME : BASE { kind.slot = part(...) }`: BASE is `reference`, `fused`, `te`, `inference`, `auto`
    or another block of the file; a slot belongs to a kind (`mamba2.scan`) or to a layer (`W.core`).
    """,
)
E029 = declare(
    "E029",
    "there is no stack",
    """
    A model needs `stack { ... }` with at least one layer, or the whole file is a bare pattern such as
    `M M M A`. A file without a stack is a library: it can be checked and imported from, not compiled.
    """,
)
E044 = declare(
    "E044",
    "a field of a block",
    """
    `A(window=4096)` changes a copy of a single layer. A block such as `[M F]` has several layers, and
    which one is meant would be a guess; change the layer inside, or write another block.
    """,
)
E045 = declare(
    "E045",
    "a sum of something else than single layers",
    """
    `M + A` runs single layers side by side on one normed input and adds their outputs. Blocks have their
    own norms and residual additions, so they cannot be branches; the branches' `norm`, `residual`,
    `input` and `recompute` are the sum's and must agree. A sum has at most 64 branches.
    """,
)
E046 = declare(
    "E046",
    "a shared layer changed at a use",
    """
    `shared S = ...` is one instance: all uses have the same weights and the same fields. Only per-use
    fields (`adapter`) may be given at a use. Declare a `layer` for one with weights of its own.
    """,
)
E047 = declare(
    "E047",
    "a repeat out of range",
    f"""
    `[M F]*24` repeats 1 time or more, and a model has at most {MAX_LAYERS:,} layers in all. The count is
    computed before anything is laid out, so `[[[M*9999]*9999]*9999]` costs nothing. Blocks may stand
    inside one another up to {MAX_DEPTH} deep.
    """,
)
E049 = declare(
    "E049",
    "a pipeline cut out of place",
    """
    `|` stands between layers of the stack. A leading one puts the embedding alone on the first stage, a
    trailing one the head alone on the last; two in a row would make an empty stage. There is none inside
    `mtp`, inside a shared item, or in a sum.
    """,
)


W029 = declare(
    "W029",
    "a name that is never used",
    """
    A layer, a shared item, a constant or an import of the file that nothing in the file refers to.

    Why: most often a layer that was meant to be in the stack, or one that a change left behind.

    Example: `layer W = A(window=4096)` in a file whose stack has no `W`.

    Instead: use it, or delete it. Files without a stack are libraries: what they declare is for others.
    """,
)


def short_count(n: int) -> str:
    """A number of layers that may be absurdly large."""
    return f"{n:,}" if n < 10**12 else f"about {float(n):.0e}" if n < 10**300 else "more than 1e300"
