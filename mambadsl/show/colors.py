"""Colours of pictures: one for each kind, one for each stage.

A kind keeps its colour in every model: its place in the registry chooses it. Fills are light, so that dark
text reads on them; the palette keeps neighbours apart for the colour-blind (after Okabe and Ito, 2008).
"""

from __future__ import annotations

from mambadsl.graph.graph import Node
from mambadsl.kinds.registry import names

INK = "#1f2933"
_KINDS = ("#f9c784", "#a9d4f5", "#7fc8f8", "#b8e0b0", "#f4b6c9", "#f3e58b", "#c7b8ea", "#f2a488", "#9fdcd0", "#d6d3c9")
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
    return _KINDS[names().index(kind) % len(_KINDS)]


def of_stage(stage: int) -> str:
    return _STAGES[stage % len(_STAGES)]
