"""Layers from Python values, without text: for graphs edited in Python and for importers."""

from __future__ import annotations

from typing import Any

from mambadsl.kinds import registry
from mambadsl.kinds.fields import Field, Mismatch
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.codes import E021
from mambadsl.spec.emit import default
from mambadsl.spec.fill import E022
from mambadsl.spec.model import LayerSpec, Mixer
from mambadsl.spec.scope import raw
from mambadsl.spec.values import E040
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.spell import nearest


def layer(kind: str, *, model: Values, **fields: Any) -> LayerSpec:
    """One layer of a kind; fields as the kind has them, defaults for the rest.

    model: the settings of the model it is for (`graph.graph["model"]`). Values are Python's: numbers,
    bools, words as str, None for `none`, `Variant` for forms. Raises MdlError.
    """
    if kind not in registry.names():
        near = nearest(kind, registry.names())
        raise MdlError([Diagnostic(E021, f"there is no kind `{kind}`", help=(f"did you mean `{near}`?",) if near else ())])
    k = registry.get(kind)
    groups = (k.fields, BRANCH_FIELDS, SUBLAYER_FIELDS)
    legal = [f.name for group in groups for f in group]
    for name in fields:
        if name not in legal:
            near = nearest(name, legal)
            help = (f"did you mean `{near}`?",) if near else ()
            raise MdlError([Diagnostic(E022, f"`{kind}` has no field `{name}`", help=help)])
    values = [_fill(group, fields, model) for group in groups]
    return LayerSpec((Mixer(kind, values[0], values[1]),), values[2])


def _fill(group: tuple[Field, ...], given: dict[str, Any], model: Values) -> Values:
    done: dict[str, Any] = {}
    for f in group:
        if f.name not in given:
            done[f.name] = default(f, Values(done), model)
            continue
        value = given[f.name]
        try:
            done[f.name] = f.type.convert(raw(value))
        except Mismatch as m:
            raise MdlError([Diagnostic(E040, f"`{f.name}` {m.rule}", help=m.help)]) from None
    return Values(done)
