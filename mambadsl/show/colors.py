"""Colours of pictures: one for each kind, one for each stage.

A kind keeps its colour in every model: its table says it, and of kinds without one their place among those chooses.
Fills are light, so that dark text reads on them, and kept apart for the colour-blind (after Okabe and Ito, 2008).
"""

from __future__ import annotations

from mambadsl.graph.graph import Node
from mambadsl.kinds.registry import all_kinds, get

INK = "#1f2933"
_OTHERS = ("#f2a488", "#9fdcd0", "#d6d3c9")
_ENDS = "#dfe3e8"
_SUM = "#eef1f4"
_STAGES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b4ea3", "#5b6570")


def of_kind(node: Node) -> tuple[str, str]:
    """(fill, text) of a node; embedding, head and the like are grey, a sum is pale."""
    if node.layer is None:
        return _ENDS, INK
    if len(node.layer.branches) > 1:
        return _SUM, INK
    return named(node.layer.branches[0].kind), INK


def named(kind: str) -> str:
    if color := get(kind).color:
        return color
    others = [other.name for other in all_kinds() if not other.color]
    return _OTHERS[others.index(kind) % len(_OTHERS)]


def of_stage(stage: int) -> str:
    return _STAGES[stage % len(_STAGES)]
