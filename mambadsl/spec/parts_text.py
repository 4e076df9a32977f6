"""A parts block as text."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mambadsl.kinds.fields import Call, Word, number_text
from mambadsl.spec.model import PartsSpec


def parts_text(block: PartsSpec) -> str:
    base = f" : {block.base}" if block.base else ""
    lines = [f"parts {block.name}{base} {{"]
    for choice in block.choices:
        args = ", ".join(f"{k}={raw_text(v)}" for k, v in choice.args)
        lines.append(f"  {choice.path} = {choice.part}" + (f"({args})" if args else ""))
    return "\n".join([*lines, "}"])


def raw_text(raw: Any) -> str:
    """A raw value (see kinds.fields) in the language."""
    match raw:
        case bool():
            return "true" if raw else "false"
        case Fraction():
            return number_text(raw)
        case str():
            return f'"{raw}"'
        case Word():
            return raw.text
        case Call():
            return f"{raw.name}({', '.join(f'{k}={raw_text(v)}' for k, v in raw.args.items())})"
        case list() | tuple():
            return "[" + ", ".join(map(raw_text, raw)) + "]"
    raise TypeError(type(raw).__name__)
