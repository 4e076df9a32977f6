"""W029: what the file declares or imports is used somewhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.spec.codes import W029
from mambadsl.spec.overrides import from_outside
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic


def check(subject: Subject) -> Iterator[Problem]:
    file = subject.graph.file
    if file is None or from_outside(file):
        return  # a value from outside may well take the place of a name
    used = {name for statement in file.statements for name in _uses(statement)}
    for statement in file.statements:
        for name, what in _declares(statement):
            if name.text not in used:
                message = f"the {what} `{name.text}` is never used"
                help = "take it out of the import" if what == "import" else "delete it, or use it"
                yield Problem(Diagnostic(W029, message, name.span, "not used in this file", help=(help,)))


def _declares(statement: tree.Statement) -> Iterator[tuple[tree.Name, str]]:
    match statement:
        case tree.Layer():
            yield statement.name, "shared layer" if statement.shared else "layer"
        case tree.Let():
            yield statement.name, "constant"
        case tree.Import():
            yield from ((name, "import") for name in statement.names)


def _uses(statement: tree.Statement) -> Iterator[str]:
    """Every name that a statement may refer to."""
    own = [name.text for name, _ in _declares(statement)]
    todo: list = [statement]
    while todo:
        node = todo.pop()
        if isinstance(node, tuple):
            todo += node
        elif isinstance(node, tree.Slot):
            yield node.path.text.partition(".")[0]
            todo.append(node.args or ())
        elif isinstance(node, (tree.Term, tree.Use)):
            if node.name.text not in own:
                yield node.name.text
            todo.append(node.args or ())
        elif isinstance(node, tree.Node):
            todo += [getattr(node, f.name) for f in fields(node)]
