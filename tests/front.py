"""The whole front of the compiler over one text, as the fuzz tests drive it: read, resolve, unroll, check;
and every diagnostic rendered. Any exception but MdlError comes through."""

from __future__ import annotations

import json

from mambadsl.graph.checks import check
from mambadsl.graph.unroll import unroll
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.render import to_github, to_json, to_text
from mambadsl.text.source import from_text

STAGES = ("read", "resolve", "unroll", "check", "fine")


def front(text: str) -> tuple[str, tuple[Diagnostic, ...]]:
    """(the stage that refused it, or "fine"; its diagnostics, which render)"""
    stage, value = "read", None
    try:
        value = from_text(text, name="fuzz.mdl")
        for stage, run in zip(STAGES, (read, resolve, unroll, check)):
            value = run(value)
        stage, found = "fine", value.diagnostics
    except MdlError as error:
        found = error.diagnostics
        assert found and any(d.severity == "error" for d in found)
    for diagnostic in found:
        rendered(diagnostic)
    return stage, found


def rendered(diagnostic: Diagnostic) -> None:
    """As text, JSON and an annotation, with every place inside its source."""
    for span in (diagnostic.span, *(label.span for label in diagnostic.labels)):
        assert span is None or 0 <= span.start <= span.end <= len(span.source.text)
    assert diagnostic.message and diagnostic.code.id in to_text(diagnostic)
    json.dumps(to_json(diagnostic), allow_nan=False)
    assert "\n" not in to_github(diagnostic)
