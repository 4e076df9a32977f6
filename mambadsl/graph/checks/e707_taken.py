"""E707, E709, W708: what layers take from above is given there, once, and in the same shape; what is given is taken."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node
from mambadsl.kinds.fields import REQUIRED
from mambadsl.kinds.kind import Carried, Dims
from mambadsl.kinds.registry import all_kinds, get
from mambadsl.kinds.values import Values
from mambadsl.spec.make import layer
from mambadsl.spec.model import Mixer
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.source import Span

E707 = declare(
    "E707",
    "a layer takes what none above gives",
    """
    Some layers read, past the residual stream, what a layer above gives: a `gmu` the scan of a Mamba layer,
    attention with `takes=kv` keys and values. They read it from the nearest layer above that gives it by that
    name; there must be one, and it must be one layer, not two branches of a sum. Each depth of the `mtp` tail is
    a chain of its own, and takes nothing from the stack.

    Why: the layer has nothing of its own to put in its place.

    Example: `stack { mamba1() gmu() }`.

    Instead: `stack { mamba1(gives=scan) gmu() }`.
    """,
)
W708 = declare(
    "W708",
    "what a layer gives is not taken",
    """
    A layer gives something to layers below it, and none of them takes it: there is none that does, or another
    layer that gives the same is nearer.

    Why: it changes nothing, and keeps memory; often a layer that should take it was forgotten.

    Example: `stack { mamba1(gives=scan) mlp() }`.

    Instead: `stack { mamba1(gives=scan) mlp() gmu() mlp() }`, or leave `gives` out.
    """,
)
E709 = declare(
    "E709",
    "a layer takes something of another shape than is given",
    """
    What a layer takes has the shape of what the nearest layer above gives by that name: for `gmu`, both have
    the same `d_inner`; for keys and values, the same `kv_heads` and `head_dim`.

    Why: it is read as it is, and multiplied with what the layer has of its own.

    Example: `stack { mamba1(d_inner=4096, gives=scan) gmu(d_inner=2048) }`.

    Instead: `gmu(d_inner=4096)`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph, d = subject.graph, subject.graph.model.d_model
    source = {(edge.target, edge.tensor): graph.by_path[edge.source] for edge in graph.edges}
    taken = {(giver.owner, name) for (_, name), giver in source.items()}
    for node in graph.nodes:
        for mixer in node.layer.branches if node.layer else ():
            kind, dims = get(mixer.kind), node.dims(d)
            for wanted in kind.takes(mixer.fields, dims):
                giver = source.get((node.path, wanted.name))
                if giver is None and not wanted.optional:
                    yield _missing(subject, node, mixer, wanted.name)
                elif giver is not None and (found := giver.gives(d)[wanted.name]).shape != wanted.shape:
                    yield _other_shape(node, mixer, wanted, giver, found)
        yield from _given(node, taken, graph.model)


def _given(node: Node, taken: set[tuple[str, str]], model: Values) -> Iterator[Problem]:
    givers: dict[str, list[Mixer]] = {}
    for mixer in node.layer.branches if node.layer else ():
        for given in get(mixer.kind).gives(mixer.fields, node.dims(model.d_model)):
            givers.setdefault(given.name, []).append(mixer)
    for name, mixers in givers.items():
        place = _place(node, mixers[-1])
        if len(mixers) > 1:
            message = f"{len(mixers)} branches of a sum give `{name}`"
            help = ("one of them may: layers below take it by its name",)
            yield Problem(Diagnostic(E707, message, place, "given again", help=help), (node,))
        # A layer that takes and gives the same is a link of a chain, and the last link has none after it.
        elif (node.owner, name) not in taken and name not in node.takes(model.d_model):
            message = f"no layer takes the `{name}` that `{mixers[0].kind}` gives here"
            help = (f"{_which('takes', name, model)} may take it, below this layer; or `gives` is left out",)
            yield Problem(Diagnostic(W708, message, place, "nothing takes this", help=help), (node,))


def _missing(subject: Subject, node: Node, mixer: Mixer, name: str) -> Problem:
    message = f"`{mixer.kind}` takes `{name}`, and no layer above gives it"
    label = f"no `{name}` here"
    if node.tail:
        message = f"`{mixer.kind}` takes `{name}`, and no layer above it in its depth of `mtp` gives it"
    help = (f"{_which('gives', name, subject.graph.model)} gives it, above this layer",)
    return Problem(Diagnostic(E707, message, _place(node, mixer), label, help=help), (node,))


def _other_shape(node: Node, mixer: Mixer, wanted: Carried, giver: Node, found: Carried) -> Problem:
    here, there = (" x ".join(map(str, carried.shape)) for carried in (wanted, found))
    message = f"`{mixer.kind}` takes a `{wanted.name}` of {here}, and `{giver.path}` gives one of {there}"
    help = (f"`{giver.path}` is the nearest layer above that gives it: the sizes of the two must agree",)
    return Problem(Diagnostic(E709, message, _place(node, mixer), f"takes {here}", help=help), (node,))


def _which(does: str, name: str, model: Values) -> str:
    """The layers that may give (or take) `name`, as text."""
    found = []
    for kind in all_kinds():
        field = kind.field(does)
        if field is not None and name in getattr(field.type, "words", ()):
            found.append(f"`{kind.name}({does}={name})`")
        elif field is None and all(f.default is not REQUIRED for f in kind.fields):
            fields, dims = layer(kind.name, model=model).branches[0].fields, Dims(model.d_model, model.d_model)
            found += [f"`{kind.name}`" for c in getattr(kind, does)(fields, dims) if c.name == name]
    return listed(found, word="or") if found else "some layer"


def _place(node: Node, mixer: Mixer) -> Span | None:
    origin = mixer.origins.get("takes") or mixer.origins.get("gives")
    return (origin.span if origin else None) or mixer.span or node.layer.span or node.span
