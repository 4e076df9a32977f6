"""Layers and settings from Python values, without text: for graphs edited in Python, for importers, and for
what was stored. Every value is held to its field's type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambadsl.kinds import registry
from mambadsl.kinds.fields import Field, Mismatch
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.codes import E021
from mambadsl.spec.emit import default
from mambadsl.spec.fill import E022
from mambadsl.spec.model import MODEL_FIELDS, MTP_FIELDS, LayerSpec, Mixer
from mambadsl.spec.scope import raw
from mambadsl.spec.values import E040
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.spell import nearest


def layer(kind: str, *, model: Values, **fields: Any) -> LayerSpec:
    """One layer of a kind; fields as the kind has them, defaults for the rest.

    model: the settings of the model it is for (`graph.graph["model"]`). Values are Python's: numbers,
    bools, words as str, None for `none`, `Variant` for forms. Raises MdlError.
    """
    groups = (_kind_fields(kind), BRANCH_FIELDS, SUBLAYER_FIELDS)
    _known(fields, [f.name for group in groups for f in group], kind)
    own, branch, sub = (_filled(group, fields, model) for group in groups)
    return LayerSpec((Mixer(kind, own, branch),), sub)


def checked(spec: LayerSpec, *, model: Values) -> LayerSpec:
    """The same layer, if all its fields are there and fit. Raises MdlError."""
    for mixer in spec.branches:
        for fields, values in (_kind_fields(mixer.kind), mixer.fields), (BRANCH_FIELDS, mixer.branch):
            _same(fields, values, model, mixer.kind)
    _same(SUBLAYER_FIELDS, spec.sub, model, "a layer")
    if not spec.branches:
        raise MdlError([Diagnostic(E021, "a layer without a kind")])
    return spec


def settings(given: Mapping[str, Any]) -> Values:
    """A model's settings, defaults for those that are missing. Raises MdlError."""
    _known(given, [f.name for f in MODEL_FIELDS], "the model")
    return _filled(MODEL_FIELDS, given, None)


def tail(given: Mapping[str, Any]) -> Values:
    """The settings of an `mtp` tail. Raises MdlError."""
    _known(given, [f.name for f in MTP_FIELDS], "mtp")
    return _filled(MTP_FIELDS, given, None)


def _kind_fields(kind: str) -> tuple[Field, ...]:
    if not registry.known(kind):
        near = nearest(kind, registry.names())
        help = (f"did you mean `{near}`?",) if near else ("kinds: " + ", ".join(registry.names()),)
        raise MdlError([Diagnostic(E021, f"there is no kind `{kind}`", help=help)])
    return registry.get(kind).fields


def _known(given: Mapping[str, Any], legal: list[str], owner: str) -> None:
    for name in given:
        if name not in legal:
            near = nearest(name, legal)
            help = (f"did you mean `{near}`?",) if near else ()
            raise MdlError([Diagnostic(E022, f"`{owner}` has no field `{name}`", help=help)])


def _same(fields: tuple[Field, ...], values: Mapping[str, Any], model: Values, owner: str) -> None:
    if missing := [f.name for f in fields if f.name not in values]:
        raise MdlError([Diagnostic(E022, f"`{owner}` without its field `{missing[0]}`")])
    _known(values, [f.name for f in fields], owner)
    for f in fields:
        if _converted(f, values[f.name]) != values[f.name]:
            raise MdlError([Diagnostic(E040, f"`{f.name}` of `{owner}` is not as the field has it")])


def _filled(fields: tuple[Field, ...], given: Mapping[str, Any], model: Values | None) -> Values:
    done: dict[str, Any] = {}
    for f in fields:
        done[f.name] = _converted(f, given[f.name]) if f.name in given else default(f, Values(done), model)
    return Values(done)


def _converted(f: Field, value: Any) -> Any:
    try:
        return f.type.convert(raw(value))
    except Mismatch as m:
        rule = m.rule if m.name_problem else f"`{f.name}` {m.rule}"
        raise MdlError([Diagnostic(E040, rule, help=m.help)]) from None
    except (ValueError, TypeError):
        raise MdlError([Diagnostic(E040, f"`{f.name}` must be {f.type.says}, not {value!r:.60}")]) from None
