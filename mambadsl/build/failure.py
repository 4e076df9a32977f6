"""A failure inside a layer gets the layer's path and its place in the text. The error stays what it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mambadsl.graph.graph import Node


@contextmanager
def located(node: Node) -> Iterator[None]:
    """Errors that pass through get notes that say which layer failed and where it is written."""
    try:
        yield
    except Exception as error:
        for note in notes(node):
            error.add_note(note)
        raise


def notes(node: Node) -> list[str]:
    """Who failed; where it is used, where it is defined, and in which turn of which repeat."""
    label = f" (`{node.layer.label}`)" if node.layer else ""
    found = [f"in layer `{node.path}`{label}" if node.layer else f"in `{node.path}`"]
    used, defined = node.span, node.layer.span if node.layer else None
    for what, span in ("used", used), ("defined", defined):
        if span is not None and (what == "used" or span != used):
            text = span.source.line_text(span.line).strip()
            found.append(f"  {what} at {span}: {text}")
    turns = [f"{f.index + 1} of {f.count} of `{f.label}`" for f in node.trail if f.count > 1]
    if turns:
        found.append("  in repeat " + ", ".join(turns))
    return found
