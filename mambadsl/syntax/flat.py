"""A part of the tree on one line, however long."""

from __future__ import annotations

from typing import Sequence

from mambadsl.syntax import tree

_LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2}


def flat(node: tree.Node | tuple) -> str:
    """A value, an item, a pattern or arguments on one line."""
    match node:
        case tree.Name(text=text) | tree.Number(text=text):
            return text
        case tree.String():
            return f'"{node.value}"'
        case tree.Bool():
            return "true" if node.value else "false"
        case tree.Arg():
            return f"{node.name.text}={flat(node.value)}" if node.name else flat(node.value)
        case tree.Term() | tree.Use():
            return node.name.text + ("" if node.args is None else f"({commas(node.args)})")
        case tree.List():
            return f"[{commas(node.items)}]"
        case tree.Binary():
            return f"{_operand(node, node.left)} {node.op} {_operand(node, node.right)}"
        case tree.Negative():
            return f"-{_operand(node, node.value)}"
        case tree.Paren():
            return f"({flat(node.value)})"
        case tree.Cut():
            return "|"
        case tree.Group():
            return f"[{flat(node.pattern)}]"
        case tree.Repeat():
            return f"{flat(node.item)}*{node.count}"
        case tree.Parallel():
            return "+".join(flat(branch) for branch in node.branches)
        case tree.Pattern():
            return " ".join(flat(item) for item in node.items)
    raise TypeError(f"no part of a line: {type(node).__name__}")


def commas(nodes: Sequence[tree.Node]) -> str:
    return ", ".join(flat(node) for node in nodes)


def _operand(parent: tree.Binary | tree.Negative, child: tree.Value) -> str:
    """Parentheses where a tree built in Python would otherwise change its meaning in the text."""
    text = flat(child)
    if isinstance(child, tree.Binary):
        above = 3 if isinstance(parent, tree.Negative) else _LEVEL[parent.op]
        right = isinstance(parent, tree.Binary) and child is parent.right
        if _LEVEL[child.op] < above or (right and _LEVEL[child.op] == above):
            return f"({text})"
    return text
