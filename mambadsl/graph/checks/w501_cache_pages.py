"""W501: vLLM makes a page of keys and values as large as a layer's recurrent state."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Site, Subject
from mambadsl.text.diagnostic import declare

W501 = declare(
    "W501",
    "a cache page covers more tokens than a sequence has",
    """
    For vLLM: a page of the cache has room for one layer's recurrent state, and attention layers have pages of
    the same size. Such a page should not hold more tokens than a sequence.

    Why: prompts are shared between requests in whole pages; if a page is longer than the prompts, nothing is
    ever shared, and short requests waste most of a page.

    Example: `mamba2(heads=128, d_state=128)` (4 MB a layer) with `attention(kv_heads=1, head_dim=64)` (256
    bytes a token): 16,592 tokens a page.

    Instead: a smaller `d_state` or fewer heads, or more key/value heads.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.facts.target != "vllm":
        return
    attention = min(subject.attending(), key=_bytes, default=None)
    recurrent = max(subject.recurrent(), key=_bytes, default=None)
    if attention is None or recurrent is None:
        return
    page, per_token = _bytes(recurrent), _bytes(attention)
    tokens = -(-page // per_token // 16) * 16
    if tokens > subject.length:
        fields = tuple(name for name in ("d_state", "heads", "d_inner") if name in recurrent.f)
        yield recurrent.problem(
            W501, f"a cache page holds {tokens:,} tokens, more than a sequence of {subject.length:,}", fields,
            label=f"{page:,} bytes of state in a layer; attention has {per_token:,} bytes a token",
            help=("a smaller state, or more key/value heads",),
        )


def _bytes(site: Site) -> int:
    """Of one layer: its state, or for attention what a token adds."""
    return sum(s.elements * (4 if s.fp32 else 2) for s in site.kind.state(site.f, site.dims))
