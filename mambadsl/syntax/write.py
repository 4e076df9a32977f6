"""File -> canonical text. `read(write(f)) == f`, every comment stays, and writing again changes nothing.

Two spaces; one statement, setting or slot a line; calls over 92 columns one argument a line; the author's
line breaks inside patterns stay; at most one blank line; `  # comment` behind what it followed. A comment
that stood inside something printed on one line moves to its own line above it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import pairwise
from typing import Sequence

from mambadsl.syntax import tree
from mambadsl.syntax.flat import commas, flat
from mambadsl.text.source import Span

WIDTH = 92
_BEHIND = re.compile(r"[ \t,]*")
_OPENING = re.compile(r"(?:[\s,():]|#[^\n]*)*\{")
_MTP = tree.Name(span=Span(None, 0, 0), text="mtp")


def write(file: tree.File) -> str:
    return _Writer(file).text()


class _Writer:
    """Walks the tree in the order of the text and lets each comment out before what it stood before.

    A block is a list of lines: the first without indent, so that it can follow something; the others with.
    """

    def __init__(self, file: tree.File):
        self.file = file
        self.source = file.source
        self.comments = [comment for comment in file.comments if self._placed(comment)]
        self.starts = [comment.span.start for comment in self.comments]
        self.next = 0  # the first comment that is not printed yet
        self.lines: list[str] = []
        self.end = 0  # how far the source is printed; what lies between here and the next node is a gap

    def text(self) -> str:
        self._built_comments()
        if self.file.pattern is not None:
            self.lines += self._pattern(self.file.pattern, indent=0, first=True)
        previous = None
        for statement in self.file.statements:
            if previous is not None and not self._placed(statement) and _apart(previous, statement):
                self.lines.append("")
            self._unit(self.lines, statement, indent=0, first=previous is None)
            previous = statement
        self.lines += self._own_lines(len(self.source.text) + 1, indent=0, first=not self.lines)[0]
        return "\n".join(self.lines) + "\n" if self.lines else ""

    def _built_comments(self) -> None:
        """The comments of a file built in Python have no place: they come first."""
        self.lines += [comment.text for comment in self.file.comments if not self._placed(comment)]
        if self.lines and self.file.statements:
            self.lines.append("")

    def _placed(self, node: tree.Node) -> bool:
        return node.span.source is self.source and node.span.end > node.span.start

    def _take(self, before: int) -> list[tree.Comment]:
        first, self.next = self.next, bisect_left(self.starts, before, self.next)
        return self.comments[first : self.next]

    def _pending(self, start: int, end: int) -> bool:
        """Whether a comment between two places is not printed yet."""
        at = bisect_left(self.starts, start, self.next)
        return at < len(self.starts) and self.starts[at] < end

    def _blank(self, start: int, *, first: bool) -> list[str]:
        return [""] if not first and self.source.text.count("\n", self.end, start) > 1 else []

    def _own_lines(self, before: int, *, indent: int, first: bool) -> tuple[list[str], bool]:
        """The comments before a place, each on its own line, and whether nothing came before still."""
        lines = []
        for comment in self._take(before):
            lines += [*self._blank(comment.span.start, first=first), " " * indent + comment.text]
            self.end, first = comment.span.end, False
        return lines, first

    def _behind(self, line: str, end: int) -> str:
        """The line with the comment that follows it in the same line of the source."""
        self.end = max(self.end, end)
        if self.next < len(self.starts) and _BEHIND.fullmatch(self.source.text, end, self.starts[self.next]):
            (comment,) = self._take(self.starts[self.next] + 1)
            self.end = comment.span.end
            return f"{line}  {comment.text}"
        return line

    def _unit(self, lines: list[str], node: tree.Node, *, indent: int, first: bool, mark: str = "") -> None:
        """One statement, setting, slot or argument on lines of its own, with its comments."""
        pad = " " * indent
        if not self._placed(node):
            block = self._block(node, indent=indent, column=indent + len(mark))
            block[-1] += mark
            lines += [pad + block[0], *block[1:]]
            return
        start, end = node.span.start, node.span.end
        above, first = self._own_lines(start, indent=indent, first=first)
        lines += above + self._blank(start, first=first or bool(mark))
        self.end = start
        block = self._block(node, indent=indent, column=indent + len(mark))
        block[-1] += mark
        inside = [pad + comment.text for comment in self._take(end)]
        block[-1] = self._behind(block[-1], end)
        lines += inside + [pad + block[0], *block[1:]]

    def _block(self, node: tree.Node, *, indent: int, column: int) -> list[str]:
        if isinstance(node, _BODIES):
            return self._with_body(node, indent=indent)
        if isinstance(node, tree.Import):
            return [f"from {flat(node.path)} import {commas(node.names)}"]
        if isinstance(node, (tree.Let, tree.Setting, tree.Layer, tree.Slot, tree.Expect)):
            head, parts = _pieces(node)
            return self._joined(head, parts, indent=indent, column=column)
        if not self._breaks(node) and column + len(text := flat(node)) <= WIDTH:
            return [text]
        match node:
            case tree.Arg(name=name):
                head = f"{name.text}=" if name else ""
                return self._joined(head, [node.value], indent=indent, column=column)
            case tree.Term() | tree.Use() if node.args is not None:
                return self._call(node.name.text + "(", node.args, ")", node, indent=indent)
            case tree.List():
                return self._call("[", node.items, "]", node, indent=indent)
            case tree.Binary() if flat(node) == f"{flat(node.left)} {node.op} {flat(node.right)}":
                return self._joined("", [node.left, f" {node.op} ", node.right], indent=indent, column=column)
            case tree.Negative() if not isinstance(node.value, tree.Binary):
                return self._joined("-", [node.value], indent=indent, column=column)
            case tree.Paren():
                return self._joined("(", [node.value, ")"], indent=indent, column=column)
            case tree.Group():
                inner = self._pattern(node.pattern, indent=indent + 2, first=True)
                if self._placed(node):
                    inner += self._own_lines(node.span.end, indent=indent + 2, first=False)[0]
                    self.end = node.span.end
                return ["[", *inner, " " * indent + "]"]
            case tree.Repeat():
                return self._joined("", [node.item, f"*{node.count}"], indent=indent, column=column)
            case tree.Parallel():
                parts = [part for branch in node.branches for part in ("+", branch)][1:]
                return self._joined("", parts, indent=indent, column=column)
        return [flat(node)]

    def _joined(self, head: str, parts: Sequence[tree.Node | str], *, indent: int, column: int) -> list[str]:
        """Blocks and marks one behind the other. Each block leaves room for what follows it."""
        lines = [head]
        widths = [len(part) if isinstance(part, str) else len(flat(part)) for part in parts]
        for number, part in enumerate(parts):
            here = len(lines[-1]) + (column if len(lines) == 1 else 0) + sum(widths[number + 1 :])
            block = [part] if isinstance(part, str) else self._block(part, indent=indent, column=here)
            lines[-1:] = [lines[-1] + block[0], *block[1:]]
        return lines

    def _call(
        self, head: str, parts: Sequence[tree.Node], tail: str, node: tree.Node, *, indent: int
    ) -> list[str]:
        """One argument or list item a line, each with a comma."""
        lines = [head]
        for part in parts:
            self._unit(lines, part, indent=indent + 2, first=True, mark=",")
        if self._placed(node):
            lines += self._own_lines(node.span.end, indent=indent + 2, first=True)[0]
        if len(lines) == 1:
            return [head + tail]
        return [*lines, " " * indent + tail]

    def _breaks(self, node: tree.Node | str) -> bool:
        """Whether it cannot be one line: a call, list or group in it holds a comment, or a group has the
        author's line breaks."""
        match node:
            case tree.Term(args=tuple()) | tree.Use(args=tuple()) | tree.List():
                return self._placed(node) and self._pending(node.span.start, node.span.end)
            case tree.Group(pattern=pattern):
                if self._placed(node) and self._pending(node.span.start, node.span.end):
                    return True
                return self._author_breaks(pattern) or any(map(self._breaks, pattern.items))
            case (
                tree.Repeat(item=inner)
                | tree.Arg(value=inner)
                | tree.Negative(value=inner)
                | tree.Paren(value=inner)
            ):
                return self._breaks(inner)
            case tree.Parallel(branches=branches):
                return any(map(self._breaks, branches))
            case tree.Binary(left=left, right=right):
                return self._breaks(left) or self._breaks(right)
        return False

    def _author_breaks(self, pattern: tree.Pattern) -> bool:
        return any(self._new_line(a, b) for a, b in pairwise(pattern.items))

    def _new_line(self, before: tree.Node, after: tree.Node) -> bool:
        both = self._placed(before) and self._placed(after)
        return both and self.source.text.find("\n", before.span.end, after.span.start) >= 0

    def _pattern(self, pattern: tree.Pattern, *, indent: int, first: bool) -> list[str]:
        """Rows of items: the author's, and a new one where the next item would pass column 92."""
        lines: list[str] = []
        row: list[str] = []
        above: list[str] = []
        pad = " " * indent

        def close(last: tree.Node | None) -> None:
            nonlocal row, above
            if row:
                if last is not None and self._placed(last):
                    row[-1] = self._behind(row[-1], last.span.end)
                lines.extend([*above, pad + row[0], *row[1:]])
                row, above = [], []

        previous: tree.Node | None = None
        for item in pattern.items:
            placed = self._placed(item)
            if placed:
                start = item.span.start
                pending = self._pending(0, start)
                if previous is None or pending or self._new_line(previous, item):
                    close(previous)
                    own, first = self._own_lines(start, indent=indent, first=first)
                    lines += own + self._blank(start, first=first)
                self.end = start
            column = indent + len(row[0]) if len(row) == 1 else len(row[-1]) if row else indent
            if row and column + 1 + len(flat(item)) > WIDTH:
                close(previous)
            block = self._block(item, indent=indent, column=column + 1 if row else indent)
            if placed:
                above += [pad + comment.text for comment in self._take(item.span.end)]
                self.end = item.span.end
            row[-1:] = [f"{row[-1]} {block[0]}", *block[1:]] if row else block
            previous, first = item, False
        close(previous)
        return lines

    def _with_body(self, node: tree.Node, *, indent: int) -> list[str]:
        head, body, start = self._head(node)
        if self._placed(node):
            brace = _OPENING.match(self.source.text, start).end()
            header = [comment.text for comment in self._take(brace)]
        else:
            header, brace = [], 0
        if isinstance(body, tree.Pattern):
            one_line = f"{head[-1]} {{ {flat(body)} }}"
            if self._in_one_line(node, body, brace) and len(one_line) <= WIDTH:
                return [*header, *head[:-1], one_line]
        opening = head[-1] + " {"
        if self._placed(node):
            opening = self._behind(opening, brace)
        inner: list[str] = []
        if isinstance(body, tree.Pattern):
            inner = self._pattern(body, indent=2, first=True)
        else:
            for number, line in enumerate(body):
                self._unit(inner, line, indent=2, first=number == 0)
        if self._placed(node):
            inner += self._own_lines(node.span.end, indent=2, first=not inner)[0]
        if not inner and opening.endswith("{"):
            return [*header, *head[:-1], opening + "}"]
        return [*header, *head[:-1], opening, *inner, "}"]

    def _head(self, node: tree.Node) -> tuple[list[str], tree.Pattern | tuple[tree.Node, ...], int]:
        """What stands before `{`, what stands inside, and a place in the source not far before `{`."""
        match node:
            case tree.Model(name=name):
                return [f"model {name.text}"], node.settings, name.span.end
            case tree.Parts(name=name, base=base):
                last = base or name
                return [f"parts {name.text}" + (f" : {base.text}" if base else "")], node.slots, last.span.end
            case tree.Stack():
                return ["stack"], node.pattern, node.span.start + len("stack")
            case tree.Mtp(args=()):
                return ["mtp"], node.pattern, node.span.start + len("mtp")
            case tree.Mtp(args=args):
                call = tree.Term(
                    span=Span(node.span.source, node.span.start, args[-1].span.end), name=_MTP, args=args
                )
                return self._block(call, indent=0, column=2), node.pattern, args[-1].span.end
        raise TypeError(type(node).__name__)

    def _in_one_line(self, node: tree.Node, body: tree.Pattern, brace: int) -> bool:
        if (
            not self._placed(node)
            or self._pending(node.span.start, node.span.end)
            or self._author_breaks(body)
        ):
            return False
        if any(map(self._breaks, body.items)):
            return False
        text = self.source.text
        return (
            text.find("\n", brace, body.span.start) < 0 and text.find("\n", body.span.end, node.span.end) < 0
        )


_BODIES = (tree.Model, tree.Parts, tree.Stack, tree.Mtp)


def _apart(before: tree.Statement, after: tree.Statement) -> bool:
    """Whether a blank line keeps two statements apart that were built in Python."""
    return isinstance(before, _BODIES) or type(before) is not type(after)


def _pieces(node: tree.Node) -> tuple[str, list[tree.Node | str]]:
    """A one-line statement as its beginning and the blocks after it."""
    match node:
        case tree.Let(name=name):
            return f"let {name.text} = ", [node.value]
        case tree.Setting(name=name):
            return f"{name.text} = ", [node.value]
        case tree.Layer(name=name, shared=shared):
            return f"{'shared' if shared else 'layer'} {name.text} = ", [node.item]
        case tree.Slot():
            return f"{node.path.text} = ", [tree.Term(span=node.span, name=node.part, args=node.args)]
        case tree.Expect():
            return "expect ", [node.left, f" {node.op} ", node.right]
    raise TypeError(type(node).__name__)
