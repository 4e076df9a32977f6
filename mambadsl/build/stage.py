"""Pipeline stages: which nodes a stage runs, what it takes and what it gives.

In: a graph, and lists of paths (from a plan or by hand) or the `|` marks of the text. Out: `Stage`s. Refuses
(E904) lists that are not the whole model, in order, once. The whole model is the only stage of one: it takes
token ids and gives logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.spell import nearest

E904 = declare(
    "E904",
    "the stages are not the model",
    """
    Stages hold every node of the graph once, in order, each at least one. A layer left out or run twice would
    train without any error and give a different model, so this is checked before anything is built. The `mtp` tail
    stays with the head.
    """,
)


#: The first of the tensors that cross, in order; what kinds give comes after them.
_ORDER = ("x", "x0", "t")


@dataclass(frozen=True, slots=True)
class Stage:
    """Stage `index` (from 0) of `count`. takes, gives: names of the tensors in and out, in order: `tokens`
    [B, T], `x` the stream, `x0` the first embedding and `t` what the last layer gave aside [B, T, d_model], what kinds
    give by their own names, `logits` [B, T, vocab]. keeps_embedding: the first embedding is read here or later. The
    nodes of `mtp` are in the last stage, with the head."""

    index: int
    count: int
    nodes: tuple[Node, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    keeps_embedding: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(node.path for node in self.nodes)

    @property
    def body(self) -> tuple[Node, ...]:
        """The nodes up to the head."""
        return tuple(node for node in self.nodes if not node.tail)

    @property
    def tail(self) -> tuple[Node, ...]:
        """The nodes of `mtp`."""
        return tuple(node for node in self.nodes if node.tail)


def whole(graph: LayerGraph) -> Stage:
    return stages(graph, [[node.path for node in graph.nodes]])[0]


def stages(graph: LayerGraph, paths: Sequence[Sequence[str]]) -> tuple[Stage, ...]:
    """One stage for each list of node paths."""
    if problems := list(_problems(graph, paths)):
        raise MdlError(problems)
    parts = [tuple(graph.by_path[path] for path in part) for part in paths]
    starts = [sum(map(len, parts[:k])) for k in range(len(parts))]
    crossing = [_crossing(graph, start) for start in starts]
    takes, gives = [("tokens",), *crossing[1:]], [*crossing[1:], ("logits",)]
    keeps = [_embedding_read(graph, start) for start in starts]
    return tuple(Stage(k, len(parts), *stage) for k, stage in enumerate(zip(parts, takes, gives, keeps)))


def at_marks(graph: LayerGraph) -> tuple[Stage, ...]:
    """The stages that the `|` marks of the text say; one stage where there are none."""
    paths: list[list[str]] = [[]]
    for node in graph.nodes:
        paths[-1].append(node.path)
        if node.cut_after:
            paths.append([])
    return stages(graph, paths)


def choose(graph: LayerGraph, *, plan: Any = None, stage: int | None = None) -> Stage:
    """The stage to build. plan: a Plan, or a list of lists of paths; without one, the text's marks."""
    if stage is None:
        return whole(graph)
    if plan is None:
        found = at_marks(graph)
    else:
        found = stages(graph, [part.paths for part in plan.stages] if hasattr(plan, "stages") else plan)
    if not 0 <= stage < len(found):
        count = "one stage" if len(found) == 1 else f"{len(found)} stages"
        help = "give `plan=`, or cut the text with `|`" if plan is None else "stages count from 0"
        raise MdlError([Diagnostic(E904, f"there is no stage {stage}: the model has {count}", help=(help,))])
    return found[stage]


def _crossing(graph: LayerGraph, start: int) -> tuple[str, ...]:
    """What the stage takes whose first node is the graph's `start`-th: the tensors made before and read there or
    later, the stream first."""
    place = {node.path: k for k, node in enumerate(graph.nodes)}
    past = {"next": "x0"}
    found = dict.fromkeys(
        past.get(e.tensor, e.tensor) for e in graph.edges if place[e.source] < start <= place[e.target]
    )
    return tuple(sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)))


def _embedding_read(graph: LayerGraph, start: int) -> bool:
    """Whether the first embedding, or the next token's, is read at the graph's `start`-th node or later."""
    return any(graph.reads[node.path] & {"x0", "next"} for node in graph.nodes[start:])


def _problems(graph: LayerGraph, paths: Sequence[Sequence[str]]):
    known = tuple(node.path for node in graph.nodes)
    given = [path for part in paths for path in part]
    for k, part in enumerate(paths):
        if not part:
            yield Diagnostic(E904, f"stage {k} has no layers", help=("leave the stage out",))
    for path in dict.fromkeys(given):
        if path not in graph.by_path:
            near = nearest(path, known)
            help = (f"did you mean `{near}`?",) if near else ()
            yield Diagnostic(E904, f"there is no layer `{path}` in the model", help=help)
        elif (times := given.count(path)) > 1:
            yield Diagnostic(E904, f"layer `{path}` is in {times} stages' lists", graph.by_path[path].span)
    if missing := [path for path in known if path not in set(given)]:
        names = ", ".join(f"`{path}`" for path in missing[:8]) + (", ..." if len(missing) > 8 else "")
        yield Diagnostic(E904, f"no stage has {names}", graph.by_path[missing[0]].span)
    for k, part in enumerate(paths):
        alone = next((graph.by_path[path] for path in part if path.startswith("mtp.") and path in graph.by_path), None)
        if alone is not None and "head" not in part:
            message = f"`{alone.path}` of the `mtp` tail is in stage {k} without the head, whose weights it reads"
            yield Diagnostic(E904, message, alone.span, help=("the tail is in the last stage, after `head`",))
    if sorted(given) == sorted(known) and given != list(known):
        k = next(k for k, (a, b) in enumerate(zip(given, known)) if a != b)
        message = f"`{given[k]}` comes where `{known[k]}` should: layers run in the model's order"
        yield Diagnostic(E904, message, graph.by_path[given[k]].span)
