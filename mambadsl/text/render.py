"""Diagnostic -> text for people, JSON for programs, annotations for GitHub. Formats only; decides nothing."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from mambadsl.text.diagnostic import Diagnostic
from mambadsl.text.source import Source, Span

TAB = 4
MAX_WIDTH = 120
_COLORS = {"error": "\033[1;31m", "warning": "\033[1;33m", "info": "\033[1;36m", "frame": "\033[1;34m"}
_BOLD, _RESET = "\033[1m", "\033[0m"


def to_text(diagnostic: Diagnostic, *, color: bool = False) -> str:
    """The diagnostic as rustc would lay it out, without a line break at its end."""
    paint = _painter(color)
    severity = diagnostic.severity
    head = paint(f"{severity}[{diagnostic.code.id}]", severity)
    lines = [head + paint(": " + _visible(diagnostic.message), "bold")]
    marks = _marks(diagnostic)
    gutter = max((len(str(mark.line)) for mark in marks), default=0)
    for number, source in enumerate(dict.fromkeys(mark.source for mark in marks)):
        here = [mark for mark in marks if mark.source is source]
        place = next((mark for mark in here if mark.primary), here[0])
        arrow = ":::" if number else "-->"
        lines.append(" " * gutter + paint(arrow, "frame") + f" {source.name}:{place.line}:{place.column}")
        if number == 0:
            lines.append(" " * (gutter + 1) + paint("|", "frame"))
        last = None
        for line in sorted({mark.line for mark in here}):
            if last is not None and line > last + 1:
                lines.append(paint("...", "frame"))
            last = line
            text, rows = _line([mark for mark in here if mark.line == line])
            lines.append((paint(f"{line:>{gutter}} |", "frame") + f" {text}").rstrip())
            for row, primary in rows:
                bar = " " * (gutter + 1) + paint("|", "frame") + " "
                lines.append(bar + paint(row, severity if primary else "frame"))
    indent = " " * (gutter + 1) if marks else "  "
    lines += [f"{indent}{paint('=', 'frame')} {_visible(note)}" for note in diagnostic.notes]
    lines += [f"{indent}{paint('= help:', 'frame')} {_visible(help)}" for help in diagnostic.help]
    return "\n".join(lines)


def to_json(diagnostic: Diagnostic) -> dict:
    """Plain data: code, severity, message, file, line, column, end_line, end_column (1-based, the end
    exclusive; None without a place), label, labels, notes, help."""
    return {
        "code": diagnostic.code.id,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        **_place(diagnostic.span),
        "label": diagnostic.label,
        "labels": [{**_place(label.span), "text": label.text} for label in diagnostic.labels],
        "notes": list(diagnostic.notes),
        "help": list(diagnostic.help),
    }


def to_github(diagnostic: Diagnostic) -> str:
    """One workflow command, which GitHub shows beside the line."""
    command = {"error": "error", "warning": "warning", "info": "notice"}[diagnostic.severity]
    properties = {}
    if diagnostic.span is not None:
        place = _place(diagnostic.span)
        properties = {"file": place["file"], "line": place["line"]}
        if place["end_line"] == place["line"]:
            properties["col"] = place["column"]
            properties["endLine"] = place["end_line"]
            properties["endColumn"] = max(place["end_column"] - 1, place["column"])
        else:
            properties["endLine"] = place["end_line"]
    properties["title"] = diagnostic.code.id
    listed = ",".join(f"{key}={_escape(str(value), ':,')}" for key, value in properties.items())
    parts = [
        diagnostic.message,
        diagnostic.label,
        *diagnostic.notes,
        *(f"help: {h}" for h in diagnostic.help),
    ]
    return f"::{command} {listed}::{_escape(chr(10).join(filter(None, parts)))}"


def _escape(text: str, also: str = "") -> str:
    for char in "%\r\n" + also:
        text = text.replace(char, f"%{ord(char):02X}")
    return text


def _place(span: Span | None) -> dict:
    if span is None:
        return {"file": None, "line": None, "column": None, "end_line": None, "end_column": None}
    line, column = span.source.line_col(span.start)
    end_line, end_column = span.source.line_col(max(span.end, span.start))
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
    }


@dataclass(frozen=True, slots=True)
class _Mark:
    """Underlined characters of one line. Spans over several lines are marked in their first."""

    source: Source
    line: int
    column: int
    length: int
    text: str
    primary: bool


def _marks(diagnostic: Diagnostic) -> list[_Mark]:
    spans = [] if diagnostic.span is None else [(diagnostic.span, diagnostic.label, True)]
    spans += [(label.span, label.text, False) for label in diagnostic.labels]
    marks = []
    for span, text, primary in spans:
        line, column = span.source.line_col(span.start)
        length = min(span.end - span.start, len(span.source.line_text(line)) - column + 1)
        marks.append(_Mark(span.source, line, column, max(length, 1), _visible(text), primary))
    return marks


def _line(marks: list[_Mark]) -> tuple[str, list[tuple[str, bool]]]:
    """One source line as shown, and the rows of marks and labels under it."""
    marks = sorted(marks, key=lambda mark: (mark.column, not mark.primary))
    raw = marks[0].source.line_text(marks[0].line)
    raw, shift = _cut(raw, marks)
    cells = [_cell(char) for char in raw]
    edges = [0]
    for cell in cells:
        edges.append(edges[-1] + _width(cell))

    def edge(column: int) -> int:
        return edges[min(max(column - 1 - shift, 0), len(cells))]

    placed = [(edge(m.column), max(edge(m.column + m.length), edge(m.column) + 1), m) for m in marks]
    row = [" "] * max(end for _, end, _ in placed)
    for start, end, mark in sorted(placed, key=lambda p: p[2].primary):
        row[start:end] = ("^" if mark.primary else "-") * (end - start)
    rows = []
    primary = any(mark.primary for mark in marks)
    # The rightmost label stands behind its mark, the others below, from right to left.
    _, last_end, last = max(placed, key=lambda p: (p[1], p[2].primary))
    behind = last.text if last_end == len(row) else ""
    rows.append(("".join(row) + (f" {behind}" if behind else ""), primary))
    for start, _, mark in sorted(placed, key=lambda p: -p[0]):
        if mark.text and mark is not last:
            rows.append((" " * start + mark.text, mark.primary))
    return "".join(cells), rows


def _cut(raw: str, marks: list[_Mark]) -> tuple[str, int]:
    """A very long line, cut around its primary mark (or the first); and how many columns moved left."""
    if len(raw) <= MAX_WIDTH:
        return raw, 0
    focus = next((mark for mark in marks if mark.primary), marks[0])
    start = max(0, min(focus.column - 1 - MAX_WIDTH // 3, len(raw) - MAX_WIDTH))
    end = min(len(raw), start + MAX_WIDTH)
    left, right = "..." * (start > 0), "..." * (end < len(raw))
    return left + raw[start + len(left) : end - len(right)] + right, start


def _cell(char: str) -> str:
    if char == "\t":
        return " " * TAB
    return _visible(char)


def _visible(text: str) -> str:
    """Without characters that could move the cursor, hide text or reorder it in a terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and c != "\n"
        else c
        for c in text
    )


def _width(cell: str) -> int:
    """Terminal columns."""
    if cell.isascii():
        return len(cell)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in cell
    )


def _painter(color: bool):
    def paint(text: str, style: str) -> str:
        if not color or not text.strip():
            return text
        return (_BOLD if style == "bold" else _COLORS[style]) + text + _RESET

    return paint
