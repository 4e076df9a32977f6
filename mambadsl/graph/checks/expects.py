"""E050, E051: `expect` lines hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.fields import number_text, show
from mambadsl.kinds.registry import names
from mambadsl.spec.model import ExpectSpec
from mambadsl.spec.values import Problem as ValueProblem
from mambadsl.spec.values import evaluate
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.spell import nearest

E050 = declare(
    "E050",
    "an `expect` line does not hold",
    """
    `expect LEFT == RIGHT` (or != <= >= < >) compares facts of the compiled model with numbers. Facts:
    `layers` (sublayers of the stack), `stages` (pipeline stages that the text cuts), `params`,
    `active_params` (what one token uses), `flops_per_token` (forward, at the model's context),
    `kv_bytes_per_token`, `state_bytes` (of one sequence), and `count(KIND)` or `count(LAYER)`.

    Why: a count from the paper catches most mistakes in a description.

    Example: `expect layers == 52` in a model whose stack has 51.

    Instead: correct the stack, or the line.
    """,
)
E051 = declare(
    "E051",
    "an unknown fact",
    """
    An `expect` line names something that is no fact, constant or setting; or `count(...)` something that is
    no kind and no layer of the model.

    Why: an expectation that cannot be computed would never fail.

    Example: `expect parameters == 8e9`.

    Instead: `expect params == 8e9`.
    """,
)
OPERATORS = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b, ">": lambda a, b: a > b,
}
FACTS = {
    "layers": lambda subject: len(subject.graph.layers),
    "stages": lambda subject: 1 + sum(node.cut_after for node in subject.graph.nodes),
    "params": lambda subject: subject.total.params,
    "active_params": lambda subject: subject.total.active_params,
    "flops_per_token": lambda subject: subject.total.flops.forward,
    "kv_bytes_per_token": lambda subject: subject.total.kv_bytes_per_token,
    "state_bytes": lambda subject: subject.total.state_bytes,
}


def check(subject: Subject) -> Iterator[Problem]:
    for expect in subject.graph.expects:
        try:
            problem = _one(subject, expect)
        except ValueProblem as found:
            problem = found.diagnostic
        if problem is not None:
            yield Problem(problem)


def _one(subject: Subject, expect: ExpectSpec) -> Diagnostic | None:
    node = expect.node
    scope = expect.scope
    left, right = (evaluate(_with_facts(side, subject, scope), scope) for side in (node.left, node.right))
    numbers = isinstance(left, Fraction) and isinstance(right, Fraction)
    if not numbers and node.op not in ("==", "!="):
        return Diagnostic(E050, f"`{node.op}` compares numbers", node.span, f"{show(left)} and {show(right)}")
    if OPERATORS[node.op](left, right):
        return None
    if not numbers:
        message = f"`{node.left.span.text}` is {show(left)}, expected {node.op} {show(right)}"
        return Diagnostic(E050, message, node.span)
    expected = _text(right) if node.op == "==" else f"{node.op} {_text(right)}"
    message = f"`{node.left.span.text}` is {_text(left)}, expected {expected}"
    label = f"{_text(abs(left - right))} too {'many' if left > right else 'few'}" if left != right else ""
    return Diagnostic(E050, message, node.span, label)


def _with_facts(node: tree.Value, subject: Subject, scope) -> tree.Value:
    """The expression with numbers in the place of facts."""
    match node:
        case tree.Binary():
            left, right = (_with_facts(side, subject, scope) for side in (node.left, node.right))
            return replace(node, left=left, right=right)
        case tree.Paren() | tree.Negative():
            return replace(node, value=_with_facts(node.value, subject, scope))
        case tree.Term(name=tree.Name(text="count"), args=args) if args is not None:
            return _number(_count(node, subject), node)
        case tree.Term(args=None) if node.name.text in FACTS:
            return _number(FACTS[node.name.text](subject), node)
        case tree.Term(args=None) if scope.lookup(node.name) is None:
            near = nearest(node.name.text, [*FACTS, "count", *scope.names()])
            help = (f"did you mean `{near}`?" if near else f"facts are {', '.join(FACTS)} and count(KIND)",)
            raise ValueProblem(Diagnostic(E051, f"there is no fact `{node.name.text}`", node.span, help=help))
        case tree.Term() if node.args:
            args = tuple(replace(arg, value=_with_facts(arg.value, subject, scope)) for arg in node.args)
            return replace(node, args=args)
    return node


def _count(node: tree.Term, subject: Subject) -> int:
    """Branches of the stack that are of a kind, or of a named layer."""
    value = node.args[0].value if len(node.args) == 1 and node.args[0].name is None else None
    if not isinstance(value, (tree.Term, tree.Use)) or value.args is not None:
        help = ("`count(mamba2)` counts a kind, `count(M)` a layer",)
        raise ValueProblem(Diagnostic(E051, "`count` takes one kind or one layer", node.span, help=help))
    what = value.name.text
    mixers = [mixer for layer in subject.graph.layers for mixer in layer.layer.branches]
    if isinstance(value, tree.Use):
        known = dict.fromkeys(mixer.name for mixer in mixers if mixer.name)
        found = sum(mixer.name == what for mixer in mixers)
    else:
        known, found = names(), sum(mixer.kind == what for mixer in mixers)
    if not found and what not in known:
        near = nearest(what, known)
        help = (f"did you mean `{near}`?",) if near else (f"there are {', '.join(known)}",)
        sort = "layer of the stack" if isinstance(value, tree.Use) else "kind"
        raise ValueProblem(Diagnostic(E051, f"there is no {sort} `{what}`", value.span, help=help))
    return found


def _number(value: int | Fraction, node: tree.Term) -> tree.Number:
    return tree.Number(str(value), Fraction(value), span=node.span)


def _text(value: Fraction) -> str:
    return f"{value.numerator:,}" if value.denominator == 1 else number_text(value)
