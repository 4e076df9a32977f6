"""From a model's graph to the chain that the planner cuts, one unit for each node; and the plan of a model.

In: a `CheckedGraph` (only that can be planned) or its `LayerGraph`, a device, the microbatch. Out: `Unit`s in
the graph's order, or the `Plan`. Refuses what plan.py refuses.

Times are a roofline: FLOPs at what large matmuls achieve, or bytes at what large copies achieve, whichever
takes longer, and at least a kernel's start. Measured times replace them (see device.py).
Cuts: a cut is crossed by every tensor made before it and read after it, each once (token ids are not sent:
every rank reads them). What makes logits stays in the last stage, where the loss is.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mambadsl.graph.cost import NARROW, WIDE, Cost, costs
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.kind import Carried
from mambadsl.plan import device as devices
from mambadsl.plan.device import Device
from mambadsl.plan.plan import Plan, plan_units
from mambadsl.plan.unit import TRAINING_BYTES_PER_PARAM, Unit

if TYPE_CHECKING:
    from mambadsl.graph.checks import CheckedGraph

#: Bytes moved for each weight element: read in a forward or input-gradient pass; read, and an fp32 gradient
#: read and written, in a weight-gradient pass.
READ, ACCUMULATE = NARROW, NARROW + 2 * WIDE
#: Edges of one tensor by two names: the first embeddings, also as those of the next tokens (MTP); the stream, after the
#: final norm.
SAME = {"next": "x0", "h": "x"}
LOGITS = (Role.HEAD, Role.MTP_OUT)


def plan(
    checked: CheckedGraph,
    *,
    stages: int | None = None,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    virtual: int | None = None,
    memory_limit: int | None = None,
    device: str | Path | Device = "h200",
    length: int | None = None,
    sequences: int = 1,
    bytes_per_param: float = TRAINING_BYTES_PER_PARAM,
) -> Plan:
    """Cuts a model for a pipeline: `units` by the device's roofline, then `plan_units` (which says what the
    other keywords mean). Raises MdlError; ValueError for a batch without tokens."""
    for name, given in ("length", length), ("sequences", sequences):
        if given is not None and given < 1:
            raise ValueError(f"{name} must be at least 1, not {given}")
    where = devices.device(device)
    length = length or checked.graph.model.context
    chain = units(
        checked.graph, device=where, length=length, sequences=sequences, bytes_per_param=bytes_per_param
    )
    return plan_units(
        chain, stages=stages, schedule=schedule, microbatches=microbatches, virtual=virtual,
        memory_limit=memory_limit, device=where, microbatch_tokens=sequences * length,
    )


def units(
    graph: LayerGraph, *, device: Device, length: int | None = None, sequences: int = 1,
    bytes_per_param: float = TRAINING_BYTES_PER_PARAM, narrow: int = NARROW,
) -> tuple[Unit, ...]:
    """The chain for microbatches of `sequences` sequences of `length` tokens (default: the model's context).

    bytes_per_param: weight, gradient and optimizer state of one trained element (default 18: bf16 and fp32
    with Adam; sharding the optimizer over n ranks makes it 6 + 12 / n). narrow: bytes of an element that layers compute
    in."""
    length = length or graph.model.context
    tokens = sequences * length
    # Those of the rows between embedding and head.
    inside = sequences * (length + graph.model.meta_tokens)
    table = costs(graph, length=length, narrow=narrow)
    sent = _sent_bytes_per_token(graph, narrow)
    cuttable = True
    # A repeated layer is one LayerSpec: what it weighs and takes is counted once.
    weights_of: dict[tuple, tuple[int, int, str | None]] = {}
    times: dict[tuple, tuple[float, float, float]] = {}
    found = []
    for node in graph.nodes:
        cost = table[node.path]
        cuttable = cuttable and node.role not in LOGITS
        what = node.role, id(node.layer), graph.streams[node.path], node.owner if node.shared else None
        if what not in weights_of or node.layer is None:
            weights_of[what] = _params(graph, node)
        own, shared, owner = weights_of[what]
        key = node.role, id(node.layer), graph.streams[node.path], own + shared
        if key not in times:
            how = dict(tokens=tokens, inside=inside, device=device, narrow=narrow)
            times[key] = _times(graph, node, cost, params=own + shared, **how)
        forward, inputs, weights = times[key]
        kept, working = cost.saved_bytes_per_token * tokens, 0
        if node.layer is not None and node.layer.sub.recompute:
            given = sum(_bytes(tensor, narrow) for tensor in node.gives(graph.model.d_model).values())
            # Of the states of blocks, the one that the layer above left: the others are those of layers above it.
            read = 1 if graph.blocks else graph.streams[node.path].read
            kept, working = (read * graph.model.d_model * _stream(graph, narrow) + given) * inside, kept
            inputs += forward
        found.append(Unit(
            path=node.path,
            kind=_kind(node),
            label=node.layer.label if node.layer is not None else node.role.value,
            forward_s=forward,
            backward_input_s=inputs,
            backward_weight_s=weights,
            static_bytes=int(own * bytes_per_param) + cost.buffers * WIDE,
            activation_bytes=kept,
            working_bytes=working,
            out_bytes=sent[node.path] * inside,
            can_cut_after=cuttable,
            cut_after=node.cut_after,
            owner=owner,
            shared_bytes=int(shared * bytes_per_param),
            params=own,
            shared_params=shared,
            detail=_detail(graph, node),
            span=node.cut_span or node.span,
        ))
    return tuple(found)


def _times(
    graph: LayerGraph, node: Node, cost: Cost, *, params: int, tokens: int, inside: int, device: Device,
    narrow: int,
) -> tuple[float, float, float]:
    """Seconds of the forward, input-gradient and weight-gradient pass of one microbatch. tokens: of it; inside: with
    meta tokens."""
    stream = sum(graph.streams[node.path]) * graph.model.d_model * _stream(graph, narrow)
    touched = 0 if node.role is Role.EMBED else params
    moved = stream * inside + cost.saved_bytes_per_token * tokens
    flops = cost.flops

    def roof(operations: float, size: float) -> float:
        return max(operations * tokens / device.bf16_flops, size / device.bytes_per_s) + device.kernel_s

    forward = roof(float(flops.forward), touched * READ + moved)
    inputs = 0.0 if node.role is Role.EMBED else roof(float(flops.backward_input), touched * READ + 2 * moved)
    return forward, inputs, roof(float(flops.backward_weight), params * ACCUMULATE + moved)


def _params(graph: LayerGraph, node: Node) -> tuple[int, int, str | None]:
    """Trained elements of its own, shared ones, and whose those are. A tied table belongs to `embed`; the
    logits of multi-token prediction read the head's."""
    own = shared = 0
    owner = node.owner if node.shared and node.role is Role.LAYER else None
    for path, weight in node_weights(graph, node):
        if not weight.trained:
            continue
        if path == f"{_table(graph)}.weight" and (graph.tied or graph.mtp):
            owner, shared = _table(graph), shared + weight.elements
        elif owner is not None and path.startswith(f"{owner}."):
            shared += weight.elements
        else:
            own += weight.elements
    if node.role is Role.MTP_OUT:
        owner, shared = _table(graph), graph.model.vocab * graph.model.d_model
    return own, shared, owner


def _table(graph: LayerGraph) -> str:
    """The node that owns the logits' weights."""
    return "embed" if graph.tied else "head"


def _sent_bytes_per_token(graph: LayerGraph, narrow: int) -> dict[str, int]:
    """Bytes per token that cross a cut after each node: every tensor once, from its maker to its last reader.
    The stream and what is carried past it are sent as two tensors, also where they are still equal."""
    place = {node.path: k for k, node in enumerate(graph.nodes)}
    until: dict[tuple[str, str], int] = {}
    size: dict[tuple[str, str], int] = {}
    d_model = graph.model.d_model
    for edge in graph.edges:
        tensor = edge.source, SAME.get(edge.tensor, edge.tensor)
        until[tensor] = max(until.get(tensor, 0), place[edge.target])
        given = graph.by_path[edge.source].gives(d_model).get(edge.tensor)
        sent = edge.width * _stream(graph, narrow) if given is None else _bytes(given, narrow)
        size[tensor] = max(size.get(tensor, 0), sent)
    change = [0] * (len(graph.nodes) + 1)
    for tensor, last in until.items():
        change[place[tensor[0]]] += size[tensor]
        change[last] -= size[tensor]
    return dict(zip(place, accumulate(change)))


def _bytes(carried: Carried, narrow: int) -> int:
    """Of one token."""
    return carried.width * (WIDE if carried.fp32 else narrow)


def _stream(graph: LayerGraph, narrow: int) -> int:
    return WIDE if graph.model.residual_dtype == "fp32" else narrow


def _kind(node: Node) -> str:
    return node.role.value if node.layer is None else "+".join(b.kind for b in node.layer.branches)


def _detail(graph: LayerGraph, node: Node) -> str:
    if node.role in LOGITS:
        return f"{graph.model.vocab:,} x {graph.model.d_model:,} logits"
    return ""
