"""Layer specs -> declarations in the language: which names they get and which fields are printed.

A layer keeps the name it was declared under, and a changed copy is written as one (`A(window=4096)`), so
that whatever speaks of layers by name (`count(A)`, `A.core` in parts) means the same in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mambadsl.kinds.fields import Field
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import ADAPTER, BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.model import LayerSpec, Mixer, Origin

LAYER_NAME = re.compile("[A-Z][A-Za-z0-9_]*")
#: A mixer of a layer.
_Branch: TypeAlias = "tuple[Mixer, LayerSpec]"
#: Fields, their values and where these came from.
_Group: TypeAlias = "tuple[tuple[Field, ...], Values, dict[str, Origin]]"
#: `name=value`, and a comment or None.
_Arg: TypeAlias = "tuple[str, str | None]"


@dataclass
class Emitter:
    """Collects declarations. full: print every field (else only what differs from its default).
    note: a comment for a field, or None, from where its value came."""

    model: Values
    full: bool = False
    note: Callable[[Origin | None], str | None] = lambda origin: None
    lines: list[str] = field(default_factory=list)
    _words: dict[tuple, str] = field(default_factory=dict)
    _bases: dict[str, _Branch] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def use(self, layer: LayerSpec) -> str:
        """How a pattern refers to the layer: `M`, `A(window=4096)` or `M + A`; declares what is new."""
        return " + ".join(self._word(mixer, layer) for mixer in layer.branches)

    def inline(self, layer: LayerSpec, name: str) -> str:
        """How `name` itself is declared as the layer."""
        mixer = layer.branches[0]
        if len(layer.branches) > 1 or mixer.name != name or layer.name != name:
            return self.use(layer)
        return call(mixer.kind, self._args((mixer, layer)))

    def reserve(self, name: str) -> None:
        """Keeps a name for something else (a shared item, a block)."""
        self._taken.add(name)

    def prefer(self, layer: LayerSpec) -> None:
        """Makes the layer what its name stands for, before changed copies come."""
        name = layer.name
        if len(layer.branches) == 1 and name and name == layer.branches[0].name and name not in self._taken:
            if LAYER_NAME.fullmatch(name):
                self._bases.setdefault(name, (layer.branches[0], layer))

    def declare(self, text: str) -> None:
        self.lines.append(text)

    def free(self, wish: str) -> str:
        """`wish`, or `wish2`, ... if it is taken."""
        name, i = wish, 1
        while name in self._taken or name in self._bases:
            i += 1
            name = f"{wish}{i}"
        self._taken.add(name)
        return name

    def _word(self, mixer: Mixer, layer: LayerSpec) -> str:
        key = (mixer.name, mixer, layer.sub)
        if key not in self._words:
            branch, name = (mixer, layer), mixer.name if LAYER_NAME.fullmatch(mixer.name or "") else None
            if name and name not in self._taken:
                self._bases.setdefault(name, branch)
            base = self._bases.get(name)
            if base is None or base[0].kind != mixer.kind:
                self._words[key] = self._declared(self.free(name or get(mixer.kind).letter), branch)
            else:
                if name not in self._taken:
                    self._taken.add(self._declared(name, base))
                args = self._args(branch, base=base)
                self._words[key] = call(name, args) if args else name
        return self._words[key]

    def _declared(self, name: str, branch: _Branch) -> str:
        self.lines.append(f"layer {name} = {call(branch[0].kind, self._args(branch))}")
        return name

    def _args(self, branch: _Branch, *, base: _Branch | None = None) -> list[_Arg]:
        """The arguments to print: what the defaults, or the layer that this is a copy of, do not give."""
        out = []
        for group, base_group in zip(_groups(*branch), _groups(*(base or branch))):
            fields, values, origins = group
            for f in fields:
                value, before = values[f.name], base_group[1][f.name]
                # What stands in the layer that is copied is given there, and so given here.
                given = base is not None and (self.full or before != default(f, base_group[1], self.model))
                usual = not self.full and value == default(f, values, self.model)
                if value != before if given else not usual:
                    text = f.type.text(value, full=self.full)
                    out.append((f"{f.name}={text}", self.note(origins.get(f.name))))
        return out


def _groups(mixer: Mixer, layer: LayerSpec) -> tuple[_Group, ...]:
    """Fields with their values and origins: of the kind, the branch, the sublayer."""
    return (
        (get(mixer.kind).fields, mixer.fields, mixer.origins),
        (BRANCH_FIELDS, mixer.branch, mixer.origins),
        (SUBLAYER_FIELDS, layer.sub, layer.origins),
    )


def default(f: Field, values: Values, model: Values | None) -> Any:
    """The field's default, given the values of the others."""
    return f.default(values, model) if callable(f.default) else f.default


def call(name: str, args: list[_Arg]) -> str:
    """`name(a=1, b=2)`; with comments, one argument a line."""
    if any(comment for _, comment in args):
        lines = (f"  {text}," + (f"  # {comment}" if comment else "") + "\n" for text, comment in args)
        return f"{name}(\n{''.join(lines)})"
    return f"{name}({', '.join(text for text, _ in args)})"


#: How much like a declaration a use looks, by its adapter.
_DECLARED = {None: 0, "none": 1}


def adapter_text(value: Any) -> str:
    """The argument by which one use of a shared item differs from others."""
    return f"adapter={ADAPTER.text(value)}"


def own_adapter(layers: list[LayerSpec]) -> Any:
    """The adapter that all these layers have; None where they differ."""
    adapters = {mixer.branch.adapter for layer in layers for mixer in layer.branches}
    return adapters.pop() if len(adapters) == 1 else None


def declared_use(uses: list[list[LayerSpec]]) -> list[LayerSpec]:
    """Of all uses of a shared item, the one to declare it by. A use gives one adapter to all its layers, so
    where they differ it is as it was declared; else the one without, if there is one."""
    return min(uses, key=lambda layers: _DECLARED.get(getattr(own_adapter(layers), "name", None), 2))


def settings(fields: tuple[Field, ...], values: Values, *, full: bool) -> list[tuple[str, str]]:
    """(name, text) of the settings to print."""
    shown = (f for f in fields if full or values[f.name] != default(f, values, None))
    return [(f.name, f.type.text(values[f.name], full=full)) for f in shown]
