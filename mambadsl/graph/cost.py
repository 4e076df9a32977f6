"""What a model costs: parameters, FLOPs, bytes, from the kinds' own tables.

Everything is per token or per sequence, before any batch: the planner multiplies. Weights that several
nodes share are owned (counted) by the first that uses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.kind import Flops, Saved, matmul
from mambadsl.kinds.registry import get
from mambadsl.kinds.residual import form_of
from mambadsl.kinds.streams import narrow_flops
from mambadsl.kinds.sublayer import adapter_weights

#: Bytes of one element in the compute dtype (bfloat16) and in float32.
NARROW, WIDE = 2, 4
NO_FLOPS = Flops(Fraction(0), Fraction(0), Fraction(0))


@dataclass(frozen=True, slots=True)
class Cost:
    """One node.

    params: trained elements it owns. used_params: trained elements it reads (shared ones too).
    active_params: of the owned ones, what one token uses (its experts). buffers: saved, not trained.
    flops: for one token, mean over a sequence of `length`. saved_bytes_per_token: kept for the backward
    pass. kv_bytes_per_token: growth of the decoding state with each token, in bfloat16.
    state_bytes: fixed decoding state of one sequence (windows of keys and values count here, full).
    """

    params: int = 0
    used_params: int = 0
    active_params: int = 0
    buffers: int = 0
    flops: Flops = NO_FLOPS
    saved_bytes_per_token: int = 0
    kv_bytes_per_token: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.used_params + other.used_params,
            self.active_params + other.active_params,
            self.buffers + other.buffers,
            self.flops + other.flops,
            self.saved_bytes_per_token + other.saved_bytes_per_token,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
            self.state_bytes + other.state_bytes,
        )


def costs(graph: LayerGraph, *, length: int | None = None, narrow: int = NARROW) -> dict[str, Cost]:
    """Cost of each node by path. length: tokens of a sequence (default: the model's context). narrow: bytes of an
    element in the compute dtype."""
    length = graph.model.context if length is None else length
    if length < 1:
        raise ValueError(f"length is a number of tokens, at least 1, not {length}")
    seen: set[str] = set()
    tables: dict = {}
    shapes: dict = {}
    found: dict[str, Cost] = {}
    used_again = {node.owner for node in graph.nodes if node.shared}
    for node in graph.nodes:
        key = (node.role, node.layer, node.tail, graph.streams[node.path])
        if key not in tables:
            tables[key] = _running(graph, node, length, narrow)
            if node.role is Role.LAYER and not node.tail and graph.model.meta_tokens:
                tables[key] = _with_meta(graph, node, length, narrow)
        # A node whose weights no other uses has new paths only: its counts depend on the layer alone.
        own = node.role is Role.LAYER and node.owner not in used_again
        if own and key in shapes:
            counts = shapes[key]
        else:
            counts = _weights(graph, node, seen)
            if own:
                shapes[key] = counts
        found[node.path] = Cost(*counts, *tables[key])
    return found


def total(costs: dict[str, Cost]) -> Cost:
    """The sum over all nodes (the whole model)."""
    sum_ = Cost()
    for cost in costs.values():
        sum_ = sum_ + cost
    return sum_


def _weights(graph: LayerGraph, node: Node, seen: set[str]) -> tuple[int, int, int, int]:
    params = used = buffers = 0
    active = Fraction(0)
    for path, weight in node_weights(graph, node):
        n = weight.elements
        used += n if weight.trained else 0
        if path in seen:
            continue
        seen.add(path)
        if weight.trained:
            params += n
            active += n * weight.active
        else:
            buffers += n
    return params, used, int(active), buffers


def _with_meta(graph: LayerGraph, node: Node, length: int, narrow: int) -> tuple[Flops, int, int, int]:
    """A layer's, where meta tokens stand before each sequence: their work is spread over its tokens, and their keys and
    values are fixed state."""
    meta = graph.model.meta_tokens
    flops, saved, kv, state = _running(graph, node, length + meta, narrow)
    share = Fraction(length + meta, length)
    parts = (part * share for part in (flops.forward, flops.backward_input, flops.backward_weight))
    return Flops(*parts), math.ceil(saved * share), kv, state + kv * meta


def _running(graph: LayerGraph, node: Node, length: int, narrow: int) -> tuple[Flops, int, int, int]:
    model = graph.model
    d, n = model.d_model, graph.streams[node.path].read
    match node.role:
        case Role.EMBED:
            return NO_FLOPS, 0 if model.embedding_norm.name == "none" else d * narrow, 0, 0
        case Role.HEAD | Role.MTP_OUT:
            # Kept: the stream, and the logits once in the compute dtype and once in float32.
            flops = matmul(model.vocab * d) + narrow_flops(model, n)
            return flops, n * d * narrow + model.vocab * (narrow + WIDE), 0, 0
        case Role.MTP_IN:
            return matmul(2 * d * d), 4 * d * narrow, 0, 0
    dims = node.dims(d)
    sub, kv, state = node.layer.sub, 0, 0
    form = form_of(sub.residual)
    flops, saved = form.flops(sub, d, n), form.saved(sub, d, n)
    # The residual stream before the norm; branches keep their own inputs.
    saved = Saved(saved.narrow + (0 if sub.norm.name == "none" else dims.d_in), saved.wide)
    for _, _, mixer in node.branches():
        kind = get(mixer.kind)
        flops += kind.flops(mixer.fields, dims, length)
        more = kind.saved(mixer.fields, dims)
        saved = Saved(saved.narrow + more.narrow, saved.wide + more.wide)
        if factors := adapter_weights(mixer.branch, kind.weights(mixer.fields, dims)):
            flops += matmul(sum(w.elements for w in factors))
            # Between the two factors.
            saved = Saved(saved.narrow + sum(w.shape[0] for w in factors[::2]), saved.wide)
        for s in kind.state(mixer.fields, dims):
            size = s.elements * (WIDE if s.fp32 else narrow)
            if s.per_token and s.window is None:
                kv += size
            else:
                state += size * (s.window + s.keep if s.per_token else 1)
    return flops, saved.narrow * narrow + saved.wide * WIDE, kv, state
