"""Layer specs -> declarations in the language: which names they get and which fields are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mambadsl.kinds.fields import Field
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import ADAPTER, BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.model import LayerSpec, Mixer, Origin


_LAYER_NAME = re.compile("[A-Z][A-Za-z0-9_]*")


@dataclass
class Emitter:
    """Collects declarations. full: print every field (else only what differs from its default).
    note: a comment for a field, or None, from where its value came."""

    model: Values
    full: bool = False
    note: Callable[[Origin | None], str | None] = lambda origin: None
    lines: list[str] = field(default_factory=list)
    _names: dict[Any, str] = field(default_factory=dict)
    _named: dict[Any, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def use(self, layer: LayerSpec) -> str:
        """How a pattern refers to the layer: `M`, or `M + A`; declares what is new."""
        return " + ".join(self._mixer(mixer, layer) for mixer in layer.branches)

    def reserve(self, name: str) -> None:
        """Keeps a name for something else (a shared item, a block)."""
        self._taken.add(name)

    def prefer(self, layer: LayerSpec) -> None:
        """Gives a layer the name it was declared under, before others ask for it."""
        key = (layer.branches[0], layer.sub)
        if key not in self._named and layer.name not in self._taken and _LAYER_NAME.fullmatch(layer.name):
            self._named[key] = self.free(layer.name)

    def declare(self, text: str) -> None:
        self.lines.append(text)

    def free(self, wish: str) -> str:
        """`wish`, or `wish2`, ... if it is taken."""
        name, i = wish, 1
        while name in self._taken:
            i += 1
            name = f"{wish}{i}"
        self._taken.add(name)
        return name

    def _mixer(self, mixer: Mixer, layer: LayerSpec) -> str:
        key = (mixer, layer.sub)
        if key not in self._names:
            kind = get(mixer.kind)
            wish = mixer.name if _LAYER_NAME.fullmatch(mixer.name or "") else kind.letter
            name = self._names[key] = self._named.get(key) or self.free(wish)
            args = [
                *self._fields(kind.fields, mixer.fields, mixer.origins),
                *self._fields(BRANCH_FIELDS, mixer.branch, mixer.origins),
                *self._fields(SUBLAYER_FIELDS, layer.sub, layer.origins),
            ]
            self.lines.append(f"layer {name} = {call(mixer.kind, args)}")
        return self._names[key]

    def _fields(
        self, fields: tuple[Field, ...], values: Values, origins: dict[str, Origin]
    ) -> list[tuple[str, str | None]]:
        """(text, comment) of each argument to print."""
        shown = [f for f in fields if self.full or values[f.name] != default(f, values, self.model)]
        texts = [f"{f.name}={f.type.text(values[f.name], full=self.full)}" for f in shown]
        return [(text, self.note(origins.get(f.name))) for f, text in zip(shown, texts)]


def default(f: Field, values: Values, model: Values | None) -> Any:
    """The field's default, given the values of the others."""
    return f.default(values, model) if callable(f.default) else f.default


def call(name: str, args: list[tuple[str, str | None]]) -> str:
    """`name(a=1, b=2)`; with comments, one argument a line."""
    if any(comment for _, comment in args):
        lines = "".join(f"  {text}," + (f"  # {comment}" if comment else "") + "\n" for text, comment in args)
        return f"{name}(\n{lines})"
    return f"{name}({', '.join(text for text, _ in args)})"


def adapter_text(value: Any) -> str:
    """The argument by which one use of a shared item differs from others."""
    return f"adapter={ADAPTER.text(value)}"


def own_adapter(layers: list[LayerSpec]) -> Any:
    """The adapter that all these layers have; None where they differ."""
    adapters = {mixer.branch.adapter for layer in layers for mixer in layer.branches}
    return adapters.pop() if len(adapters) == 1 else None


def declared_use(uses: list[list[LayerSpec]]) -> list[LayerSpec]:
    """Of all uses of a shared item, the one to declare it by. A use gives one adapter to all its layers, so
    where they differ it is as it was declared."""
    return next((layers for layers in uses if own_adapter(layers) is None), uses[0])


def settings(fields: tuple[Field, ...], values: Values, *, full: bool) -> list[tuple[str, str]]:
    """(name, text) of the settings to print."""
    shown = (f for f in fields if full or values[f.name] != default(f, values, None))
    return [(f.name, f.type.text(values[f.name], full=full)) for f in shown]
