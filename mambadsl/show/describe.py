"""What a layer is, in a few words: its kind, and the fields that a reader looks for.

In: a node of a graph. Out: text. Which fields: what the source gives, in its order, sizes before words; no
initial values or multipliers. All from the kinds' tables.
"""

from __future__ import annotations

from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.kinds.fields import Field, Flag, Int, OneForm, OneOf, OrWord, Type
from mambadsl.kinds.kind import Kind
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.spec.model import MODEL_FIELDS, Mixer

_WORDS = (OneForm, OneOf, Flag)
_ROLES = {Role.EMBED: "embedding", Role.HEAD: "logits", Role.MTP_IN: "join", Role.MTP_OUT: "logits"}
MODEL_HEAD = ("d_model", "vocab", "context", "norm", "tie_embeddings")


def kind_text(node: Node) -> str:
    """`mamba2`, `mamba2 + attention`, `embedding`."""
    if node.layer is None:
        return _ROLES[node.role]
    return " + ".join(branch.kind for branch in node.layer.branches)


def shape_text(graph: LayerGraph, node: Node) -> str:
    """The fields of a single layer; the table's size of embedding and head; nothing for a sum."""
    if node.layer is not None:
        return mixer_text(node.layer.branches[0]) if len(node.layer.branches) == 1 else ""
    model = graph.model
    text = {Role.EMBED: f"{model.vocab} x {model.d_model}", Role.HEAD: f"{model.d_model} x {model.vocab}"}
    return text.get(node.role, "") + (", tied to embed" if node.role is Role.HEAD and graph.tied else "")


def mixer_text(mixer: Mixer) -> str:
    """`heads=32 kv_heads=8 head_dim=128 rope=none`"""
    kind = get(mixer.kind)
    return " ".join(f"{f.name}={_short(f.type, mixer.fields[f.name])}" for f in _chosen(kind, mixer))


def all_fields(node: Node) -> tuple[tuple[str, str], ...]:
    """(name, value in the language) of every field of a layer; branches' names before theirs in a sum."""
    if node.layer is None:
        return ()
    found = [(f.name, f.type.text(node.layer.sub[f.name])) for f in SUBLAYER_FIELDS]
    several = len(node.layer.branches) > 1
    for i, mixer in enumerate(node.layer.branches):
        prefix = f"{i}." if several else ""
        found += [(prefix + f.name, f.type.text(mixer.fields[f.name])) for f in get(mixer.kind).fields]
        found += [(prefix + f.name, f.type.text(mixer.branch[f.name])) for f in BRANCH_FIELDS]
    return tuple(found)


def model_texts(graph: LayerGraph) -> tuple[str, ...]:
    """The model's settings: the usual ones, and what differs from its default."""
    found = []
    for f in MODEL_FIELDS:
        value = graph.model[f.name]
        if f.name in MODEL_HEAD or value != f.default:
            found.append(f"{f.name}={_short(f.type, value)}")
    return tuple(found)


def _chosen(kind: Kind, mixer: Mixer) -> list[Field]:
    """What the source gives; sizes that follow from the model where it gives none; other words than usual. First, what
    the layer gives to others and takes from them."""
    sizes = [f for f in kind.fields if _is_size(f.type)]
    given = [f for f in sizes if _given(f, mixer)]
    if not given:
        given = [f for f in sizes if callable(f.default) and mixer.fields[f.name] is not None]
    words = [f for f in kind.fields if isinstance(f.type, _WORDS) and (_given(f, mixer) or _unusual(f, mixer))]
    first = [f for f in words if f.name in ("gives", "takes")]
    sizes, words = (sorted(some, key=lambda f: _written_at(f, mixer)) for some in (given, words))
    return [*first, *sizes, *(f for f in words if f not in first)]


def _unusual(field: Field, mixer: Mixer) -> bool:
    return not callable(field.default) and mixer.fields[field.name] != field.default


def _given(field: Field, mixer: Mixer) -> bool:
    origin = mixer.origins.get(field.name)
    return origin is not None and origin.how != "default"


def _written_at(field: Field, mixer: Mixer) -> float:
    """The author's order; what nobody wrote comes last."""
    origin = mixer.origins.get(field.name)
    return origin.span.start if origin is not None and origin.span is not None else float("inf")


def _is_size(type: Type) -> bool:
    return isinstance(type, Int) or (isinstance(type, OrWord) and isinstance(type.type, Int))


def _short(type: Type, value: object) -> str:
    """A form without the fields that have their defaults: `rope(theta=10000)`, `none`."""
    if not isinstance(type, OneForm):
        return type.text(value)
    fields = [f for f in type.forms[value.name] if value.values[f.name] != f.default]
    inner = ", ".join(f"{f.name}={_short(f.type, value.values[f.name])}" for f in fields)
    return f"{value.name}({inner})" if inner else value.name
