"""From a model's graph to the chain that the planner cuts: one unit for each node.

In: a checked `LayerGraph`, a device, the microbatch. Out: `Unit`s in the graph's order. Refuses nothing that
the checks let through.

Times are a roofline: FLOPs at what large matmuls achieve, or bytes at what large copies achieve, whichever
takes longer, and at least a kernel's start. Measured times replace them (see device.py).
Cuts: a cut is crossed by every tensor made before it and read after it, each once (token ids are not sent:
every rank reads them). What makes logits stays in the last stage, where the loss is.
"""

from __future__ import annotations

from mambadsl.graph.cost import NARROW, WIDE, Cost, costs
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import node_weights
from mambadsl.plan.device import Device
from mambadsl.plan.unit import TRAINING_BYTES_PER_PARAM, Unit

#: Bytes moved for each weight element: read in a forward or input-gradient pass; read, and an fp32 gradient
#: read and written, in a weight-gradient pass.
READ, ACCUMULATE = NARROW, NARROW + 2 * WIDE
LOGITS = (Role.HEAD, Role.MTP_OUT)


def units(
    graph: LayerGraph, *, device: Device, length: int | None = None, sequences: int = 1,
    bytes_per_param: float = TRAINING_BYTES_PER_PARAM,
) -> tuple[Unit, ...]:
    """The chain for microbatches of `sequences` sequences of `length` tokens (default: the model's context).

    bytes_per_param: weight, gradient and optimizer state of one trained element (default 18: bf16 and fp32
    with Adam; sharding the optimizer over n ranks makes it 6 + 12 / n)."""
    length = length or graph.model.context
    tokens = sequences * length
    table = costs(graph, length=length)
    sent = _sent_bytes_per_token(graph)
    cuttable = True
    times: dict[tuple, tuple[float, float, float]] = {}
    found = []
    for node in graph.nodes:
        cost = table[node.path]
        cuttable = cuttable and node.role not in LOGITS
        own, shared, owner = _params(graph, node)
        key = (node.role, id(node.layer), own + shared)
        if key not in times:
            times[key] = _times(graph, node, cost, params=own + shared, tokens=tokens, device=device)
        forward, inputs, weights = times[key]
        kept, working = cost.saved_bytes_per_token * tokens, 0
        if node.layer is not None and node.layer.sub.recompute:
            kept, working = graph.model.d_model * _stream(graph) * tokens, kept
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
            out_bytes=sent[node.path] * tokens,
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
    graph: LayerGraph, node: Node, cost: Cost, *, params: int, tokens: int, device: Device
) -> tuple[float, float, float]:
    """Seconds of the forward, input-gradient and weight-gradient pass of one microbatch."""
    stream = 2 * graph.model.d_model * _stream(graph)
    touched = 0 if node.role is Role.EMBED else params
    moved = (stream + cost.saved_bytes_per_token) * tokens
    flops = cost.flops

    def roof(operations: float, size: float) -> float:
        return max(operations * tokens / device.bf16_flops, size / device.bytes_per_s) + device.kernel_s

    forward = roof(float(flops.forward), touched * READ + moved)
    inputs = 0.0 if node.role is Role.EMBED else roof(float(flops.backward_input), touched * READ + 2 * moved)
    return forward, inputs, roof(float(flops.backward_weight), params * ACCUMULATE + moved)


def _params(graph: LayerGraph, node: Node) -> tuple[int, int, str | None]:
    """Trained elements of its own, shared ones, and whose those are. A tied embedding belongs to `embed`; so
    does the table that multi-token prediction reads; its logits read the head's."""
    own = shared = 0
    owner = node.owner if node.shared and node.role is Role.LAYER else None
    for path, weight in node_weights(graph, node):
        if not weight.trained:
            continue
        if path in ("embed.weight", "head.weight") and (graph.tied or graph.mtp):
            owner, shared = path.removesuffix(".weight"), shared + weight.elements
        elif owner is not None and path.startswith(f"{owner}."):
            shared += weight.elements
        else:
            own += weight.elements
    if node.role in (Role.MTP_IN, Role.MTP_OUT):
        owner = "embed" if graph.tied or node.role is Role.MTP_IN else "head"
        shared = graph.model.vocab * graph.model.d_model
    return own, shared, owner


def _sent_bytes_per_token(graph: LayerGraph) -> dict[str, int]:
    """Bytes per token that cross a cut after each node: each maker's tensor once, up to its last reader."""
    place = {node.path: k for k, node in enumerate(graph.nodes)}
    size = _stream(graph)
    until: dict[str, int] = {}
    width: dict[str, int] = {}
    for edge in graph.edges:
        if edge.tensor != "tokens" and edge.source in place:
            until[edge.source] = max(until.get(edge.source, 0), place[edge.target])
            width[edge.source] = max(width.get(edge.source, 0), edge.width)
    ends: dict[int, int] = {}
    live, found = 0, {}
    for k, node in enumerate(graph.nodes):
        live -= ends.pop(k, 0)
        if node.path in until:
            live += width[node.path] * size
            ends[until[node.path]] = ends.get(until[node.path], 0) + width[node.path] * size
        found[node.path] = live
    return found


def _stream(graph: LayerGraph) -> int:
    return WIDE if graph.model.residual_dtype == "fp32" else NARROW


def _kind(node: Node) -> str:
    return node.role.value if node.layer is None else "+".join(b.kind for b in node.layer.branches)


def _detail(graph: LayerGraph, node: Node) -> str:
    if node.role in LOGITS:
        return f"{graph.model.vocab:,} x {graph.model.d_model:,} logits"
    return ""
