"""The machine that parts are chosen for: its device, and which packages it has.

No torch here: `build` and the commands that look at this machine say what they found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


def not_found(modules: tuple[str, ...]) -> str | None:
    """Why a package is not there, from its modules' names alone; None where all can be found."""
    for module in modules:
        top = module.partition(".")[0]
        try:
            missing = find_spec(top) is None
        except (ImportError, ValueError):
            missing = True
        if missing:
            return "not installed"
    return None


@dataclass(frozen=True)
class Machine:
    """device: "cuda" or "cpu". capability: of the GPU, (9, 0) for an H200; None where unknown (a plan for another
    machine). missing: package -> why it cannot be used here, or None."""

    device: str = "cpu"
    name: str = ""
    capability: tuple[int, int] | None = None
    missing: Callable[[Any], str | None] = field(
        default=lambda package: not_found(package.modules), compare=False, repr=False
    )
