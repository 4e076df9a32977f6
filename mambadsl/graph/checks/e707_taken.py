"""E707, E709, W708: what layers take from above is given there, once, and in the same shape; what is given is taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from mambadsl.graph.checks.legal import listed
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node
from mambadsl.kinds.fields import REQUIRED, Field
from mambadsl.kinds.kind import Carried, Dims, Kind
from mambadsl.kinds.registry import all_kinds, get
from mambadsl.kinds.values import Values, Variant
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
            help = (f"{_which('takes', name, model)} may take it, below this layer; or it is not given",)
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
    dims, found = Dims(model.d_model, model.d_model), []
    for kind in all_kinds():
        forms = _forms(kind, model) if all(f.default is not REQUIRED for f in kind.fields) else ()
        names = (text for text, fields in forms if any(c.name == name for c in getattr(kind, does)(fields, dims)))
        found += [f"`{text}`" for text in islice(names, 1)]
    return listed(found, word="or") if found else "some layer"


def _forms(kind: Kind, model: Values) -> Iterator[tuple[str, Values]]:
    """A layer with its defaults, and with each other word of a field, or of a field of a form."""
    usual = layer(kind.name, model=model).branches[0].fields
    yield kind.name, usual
    for field in kind.fields:
        for text, value in _words(field):
            yield f"{kind.name}({text})", usual.replace(**{field.name: value})


def _words(field: Field) -> Iterator[tuple[str, Any]]:
    for word in getattr(field.type, "words", ()):
        yield f"{field.name}={word}", word
    for name, inner in getattr(field.type, "forms", {}).items():
        if any(f.default is REQUIRED for f in inner):
            continue
        form = field.type.convert_word(name)
        for text, value in chain.from_iterable(map(_words, inner)):
            key = text.partition("=")[0]
            yield f"{field.name}={name}({text})", Variant(name, form.values.replace(**{key: value}))


def _place(node: Node, mixer: Mixer) -> Span | None:
    """Where the text says that something is given or taken; otherwise the layer."""
    kind, dims = get(mixer.kind), Dims(1, 1)

    def carried(fields: Values) -> set[str]:
        return {c.name for c in (*kind.gives(fields, dims), *kind.takes(fields, dims))}

    for field in kind.fields:
        origin = mixer.origins.get(field.name)
        if origin and origin.span and not callable(field.default):
            if carried(mixer.fields) != carried(mixer.fields.replace(**{field.name: field.default})):
                return origin.span
    return mixer.span or node.layer.span or node.span
