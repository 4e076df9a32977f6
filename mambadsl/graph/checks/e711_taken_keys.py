"""E711: attention that takes keys and values reads them as their giver made them."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Site, Subject
from mambadsl.kinds.values import Values
from mambadsl.text.diagnostic import declare

E711 = declare(
    "E711",
    "attention cannot read the keys that it takes",
    """
    Attention with `takes=kv` has queries only; keys and values are those of the nearest layer above with
    `gives=kv`. They come as that layer reads them: turned by its `rope`, as old as its `window`. So the two have
    the same `rope`, and the window of the one that takes is no wider, nor does it `keep` more first tokens. It
    has no keys of its own to scale (`key_multiplier`) or to give.

    Why: queries and keys that are turned differently do not meet, and in decoding the giver has let go of keys
    older than its window.

    Example: `layer G = attention(window=512, gives=kv)` with `layer T = attention(takes=kv)` below.

    Instead: `T(window=512)`, or `G(window=none)`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph = subject.graph
    givers = {e.target: graph.by_path[e.source] for e in graph.edges if e.tensor == "kv"}
    for site in subject.sites("attention"):
        if site.f.takes != "kv":
            continue
        if site.f.gives == "kv":
            help = ("layers below take those of the same giver: leave `gives` out",)
            message = "attention that takes keys and values has none of its own to give"
            yield site.problem(E711, message, ("gives", "takes"), label="gives what it takes", help=help)
        if site.f.key_multiplier != 1:
            message = "attention that takes keys has none of its own to scale"
            help = ("`key_multiplier=1`, and the scale where the keys are made",)
            yield site.problem(E711, message, ("key_multiplier", "takes"), help=help)
        others = {
            (node.path, mixer.fields): None
            for node in (givers[node.path] for node in site.nodes if node.path in givers)
            for mixer in node.layer.branches if mixer.fields.get("gives") == "kv"
        }
        for path, given in others:
            yield from _differences(site, path, given)


def _differences(site: Site, path: str, given: Values) -> Iterator[Problem]:
    """path, given: the layer that gives the keys, and its fields."""
    if site.f.rope != given.rope:
        kind = site.kind.field("rope").type
        message = f"queries are turned otherwise than the keys that they meet, of `{path}`"
        help = (f"`rope={kind.text(given.rope, full=False)}`, as in `{path}`",)
        yield site.problem(E711, message, ("rope", "takes"), help=help)
    if given.window is not None and (site.f.window is None or site.f.window > given.window):
        message = f"the window is wider than that of `{path}`, which keeps the keys"
        help = (f"`window={given.window}` or less, or a wider one in `{path}`",)
        label = f"`{path}` keeps the last {given.window}"
        yield site.problem(E711, message, ("window", "takes"), label=label, help=help)
    if given.window is not None and site.f.keep > given.keep:
        message = f"more first tokens are kept than by `{path}`, which keeps the keys"
        help = (f"`keep={given.keep}` or less, or more in `{path}`",)
        yield site.problem(E711, message, ("keep", "takes"), label=f"`{path}` keeps the first {given.keep}", help=help)
