"""Assignment -> the functions that fill the slots: parts' code is imported here, and nowhere before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mambadsl.kinds.values import Values
from mambadsl.parts import registry
from mambadsl.parts.part import REFERENCE, Part
from mambadsl.plan.assign import Assignment


@dataclass(frozen=True)
class Filled:
    """functions: slot name -> function, of slots that a part fills. takes_norm: the part of the entry projection does
    the norm before it."""

    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    takes_norm: bool = False


NOTHING = Filled()


def fill(assignment: Assignment, path: str) -> Filled:
    """The functions of the branch at `path`, or of `model`."""
    chosen = {s: c for s, c in assignment.of(path).items() if c.part not in (None, REFERENCE)}
    functions = {slot: _made(registry.part(c.part), c.args) for slot, c in chosen.items()}
    takes_norm = any(registry.part(c.part).takes_norm for c in chosen.values())
    return Filled(functions, takes_norm)


@cache
def _made(part: Part, args: Values) -> Callable[..., Any]:
    """One function for all layers alike: torch.compile tells functions apart by identity."""
    return part.load()(**args)
