"""Values of fields: a frozen record (`Values`) and a tagged record (`Variant`).

    f = Values(heads=32, rope=Variant("rope", Values(theta=10000)))
    f.heads, f.rope.name, f.rope.theta
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Values(Mapping):
    """A frozen, hashable mapping whose keys are attributes too. Order is the declaration's."""

    __slots__ = ("_items", "_hash")

    def __init__(self, items: Mapping[str, Any] | None = None, /, **more: Any):
        object.__setattr__(self, "_items", {**(items or {}), **more})
        object.__setattr__(self, "_hash", None)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return self._items[key]
        except KeyError:
            raise AttributeError(f"no field `{key}`; there are {', '.join(self._items)}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("Values are frozen; use replace()")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            object.__setattr__(self, "_hash", hash(tuple(self._items.items())))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._items == other._items

    def __repr__(self) -> str:
        return "Values(" + ", ".join(f"{k}={v!r}" for k, v in self._items.items()) + ")"

    def __reduce__(self):
        return Values, (self._items,)

    def replace(self, **changes: Any) -> Values:
        unknown = changes.keys() - self._items.keys()
        if unknown:
            raise KeyError(", ".join(sorted(unknown)))
        return Values({**self._items, **changes})


class Variant:
    """One of several forms, with that form's own values: `none`, `rope(theta=10000)`."""

    __slots__ = ("name", "values")

    def __init__(self, name: str, values: Values | None = None):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values if values is not None else Values())

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("a Variant is frozen")

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        return getattr(self.values, key)

    def __hash__(self) -> int:
        return hash((self.name, self.values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variant) and (self.name, self.values) == (other.name, other.values)

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.values.items())
        return f"{self.name}({inner})" if inner else self.name

    def __reduce__(self):
        return Variant, (self.name, self.values)


NONE = Variant("none")
