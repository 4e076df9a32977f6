"""The loss that keeps experts balanced in training: a setting of the whole model there, a field of each layer here.

transformers adds `router_aux_loss_coef` times its `load_balancing_loss_func` where `output_router_logits` is on, alike
in every family whose configuration has the former: experts * sum over experts of (choices for a token) * (mean of the
scores), over all tokens of all layers at once. That is top_k times ours, and a mean over layers where ours add up: each
layer of ours has coefficient * top_k / layers. Of one layer and row, both are the same loss; several layers are
balanced in the mean there, each by itself here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.hf.config import E611, Settings
from mambadsl.kinds.values import Values
from mambadsl.spec.model import Mixer
from mambadsl.text.diagnostic import Diagnostic, MdlError

ON, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"
FIELD = "aux_loss"
#: Digits that are kept: one division more or less is not to be seen, there and back.
_READ, _WRITTEN = 12, 10


def balanced(graph: LayerGraph, c: Settings) -> LayerGraph:
    """With what the settings say of it; layers of the `mtp` tail, which transformers has not, as the stack's. Raises
    MdlError (E611)."""
    layers = _layers(graph)
    if not layers or not knows(c.config) or not getattr(c, ON):
        return graph
    coefficient = getattr(c, COEFFICIENT) or 0
    if not 0 <= coefficient < math.inf:
        message = f"`{COEFFICIENT}` is {coefficient}; numbers from 0 have a counterpart"
        raise MdlError([Diagnostic(E611, message, c.span(COEFFICIENT))])
    each = coefficient / len(layers)
    return replace(graph, nodes=tuple(_with(node, each) for node in graph.nodes))


def written(graph: LayerGraph) -> dict[str, Any]:
    """The settings that say so; of layers that differ, those of as much in all."""
    whole = sum(mixer.fields[FIELD] / mixer.fields.top_k for mixer in _layers(graph))
    return {ON: True, COEFFICIENT: _rounded(whole, _WRITTEN)} if whole else {ON: False}


def knows(config: Any) -> bool:
    """Whether the configuration's class has the coefficient: the others' models add no such loss."""
    return COEFFICIENT in type(config)().to_dict()


def _layers(graph: LayerGraph) -> list[Mixer]:
    return [mixer for node in graph.layers for mixer in node.layer.branches if FIELD in mixer.fields]


def _with(node: Node, each: float) -> Node:
    if node.layer is None:
        return node
    branches = tuple(
        replace(mixer, fields=Values({**mixer.fields, FIELD: _rounded(each * mixer.fields.top_k, _READ)}))
        if FIELD in mixer.fields else mixer for mixer in node.layer.branches
    )
    return replace(node, layer=replace(node.layer, branches=branches))


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
