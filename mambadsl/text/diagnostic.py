"""What is wrong, as data: a code, a sentence, places, help. Text is made by `render` at the edge.

A code is declared once, beside the check that raises it: `E204 = declare("E204", title, story)`;
`mambadsl explain E204` prints the story.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable

if TYPE_CHECKING:
    from mambadsl.text.source import Span

#: Families: the first letter is the severity (E error, W warning, I information).
FAMILIES = {
    "0": "the text: files, grammar, names, imports, values",
    "1": "Mamba shapes and what kernels accept",
    "2": "heads, groups and parallel sizes",
    "3": "initial values, optimiser and precision",
    "4": "data, packing and masks",
    "5": "memory and serving",
    "6": "other tools' formats",
    "7": "architecture",
    "8": "the plan",
    "9": "the build",
}

CODES: dict[str, Code] = {}


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of problem. `story` is the long text that `explain` prints (Markdown)."""

    id: str
    title: str
    story: str

    @property
    def severity(self) -> str:
        return {"E": "error", "W": "warning", "I": "info"}[self.id[0]]


def declare(id: str, title: str, story: str) -> Code:
    """Registers a code; each id is declared once in the whole project."""
    if not re.fullmatch(r"[EWI][0-9]{3}", id) or id in CODES:
        raise ValueError(f"bad or repeated diagnostic code {id}")
    CODES[id] = Code(id, title, inspect.cleandoc(story))
    return CODES[id]


@dataclass(frozen=True, slots=True)
class Label:
    """A second place that belongs to the problem: `heads set here`."""

    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem.

    message: a sentence with the rule; span: the smallest guilty place (None: the whole file or no
    file); label: a few words under the caret (the values found); labels: further places;
    notes: facts (`used 6 times ...`); help: what to write instead, nearest legal values first.
    """

    code: Code
    message: str
    span: Span | None = None
    label: str = ""
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()

    @property
    def severity(self) -> str:
        return self.code.severity


class MdlError(Exception):
    """Every problem of one stage. `diagnostics` holds errors first; `str()` renders them all."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        from mambadsl.text.render import to_text

        return "\n".join(to_text(d) for d in self.diagnostics)

    def __reduce__(self):
        return MdlError, (self.diagnostics,)
