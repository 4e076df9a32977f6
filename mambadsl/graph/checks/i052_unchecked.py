"""I052: `expect` lines speak of the model as written, so values from outside leave them unchecked."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, declare

I052 = declare(
    "I052",
    "`expect` lines that were not checked",
    """
    With `--set`, the model is another one than the file describes, and its `expect` lines are not checked.

    Why: an expectation states a fact of the model as written. Of a smaller copy it would nearly always be
    wrong, and a check that fails for a known reason teaches people to ignore it.

    Example: `mambadsl check model.mdl --set d_model=256` where the file says `expect params == 8e9`.

    Instead: nothing is wrong. To check the facts, leave `--set` out.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph = subject.graph
    left = [s for s in (graph.file.statements if graph.file else ()) if isinstance(s, tree.Expect)]
    if left and not graph.expects:
        lines = "1 `expect` line is" if len(left) == 1 else f"{len(left)} `expect` lines are"
        message = f"{lines} not checked: the model is changed from outside"
        yield Problem(Diagnostic(I052, message, left[0].span, "speaks of the model as written"))
