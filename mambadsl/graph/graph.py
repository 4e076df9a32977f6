"""The model as a graph: nodes are residual sublayers (and embedding, head), edges are tensors.

`LayerGraph` is frozen and ordered; `to_networkx` gives the same graph as a networkx.DiGraph that may be
edited, and `from_networkx` takes it back (to be checked again). Equality compares content: paths,
kinds, fields, weights' owners, cuts and edges, never places in text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from mambadsl.kinds.kind import Carried, Dims
from mambadsl.kinds.registry import get
from mambadsl.kinds.residual import form_of
from mambadsl.kinds.streams import begins, streams_of
from mambadsl.kinds.sublayer import input_width
from mambadsl.kinds.values import Values
from mambadsl.spec.model import ExpectSpec, LayerSpec, Mixer, MtpSpec, PartsSpec
from mambadsl.syntax import tree
from mambadsl.text.source import Span


class Role(StrEnum):
    EMBED = "embed"  #: token ids -> x
    LAYER = "layer"  #: one residual sublayer
    HEAD = "head"  #: final norm and logits
    MTP_IN = "mtp_in"  #: norms and joins the next token's embedding and the hidden state
    MTP_OUT = "mtp_out"  #: final norm of one depth, and the logits by the head's weights


@dataclass(frozen=True)
class Frame:
    """One block around a node: `[M F]*3`, or a named block. index: which repeat, of `count`. span: where it
    stands; chain: where its name is declared, and then imported."""

    label: str
    index: int
    count: int
    span: Span | None = field(default=None, compare=False, repr=False)
    chain: tuple[Span, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Node:
    """path: identity, global and stage-free (`embed`, `stack.12`, `mtp.0.1`, `head`). owner: the path
    that its weights are named by; other than `path` only where weights are shared. cut_after: a `|`
    follows. trail: the blocks around it, outermost first."""

    path: str
    role: Role
    layer: LayerSpec | None = None
    owner: str = ""
    cut_after: bool = False
    span: Span | None = field(default=None, compare=False, repr=False)
    cut_span: Span | None = field(default=None, compare=False, repr=False)
    trail: tuple[Frame, ...] = field(default=(), compare=False, repr=False)

    def branches(self) -> tuple[tuple[str, str, Mixer], ...]:
        """(path of the branch, prefix of its weights, mixer) of each branch."""
        if self.layer is None:
            return ()
        if len(self.layer.branches) == 1:
            return ((self.path, f"{self.owner}.mixer", self.layer.branches[0]),)
        return tuple(
            (f"{self.path}.{i}", f"{self.owner}.{i}", mixer) for i, mixer in enumerate(self.layer.branches)
        )

    def dims(self, d_model: int) -> Dims:
        return Dims(d_model, input_width(self.layer.sub, d_model))

    def gives(self, d_model: int) -> dict[str, Carried]:
        """What its branches give to layers below, by name."""
        return {c.name: c for m in self._mixers for c in get(m.kind).gives(m.fields, self.dims(d_model))}

    def takes(self, d_model: int) -> dict[str, Carried]:
        """What its branches take from layers above, by name."""
        return {c.name: c for m in self._mixers for c in get(m.kind).takes(m.fields, self.dims(d_model))}

    @property
    def _mixers(self) -> tuple[Mixer, ...]:
        return () if self.layer is None else self.layer.branches

    @property
    def tail(self) -> bool:
        """It belongs to `mtp`."""
        return self.path.startswith("mtp.")

    @property
    def depth(self) -> int | None:
        """Which depth of `mtp` it belongs to, from 0."""
        return int(self.path.split(".")[1]) if self.tail else None

    @property
    def depth_owner(self) -> str:
        """What the weights of the depth's ends are named by: `mtp.0`, for every depth where all share them."""
        return self.owner.rpartition(".")[0]

    @property
    def shared(self) -> bool:
        return self.owner != self.path

    @property
    def aside(self) -> bool:
        """It adds nothing to the residual stream; the next layer reads what it gives."""
        return self.layer is not None and not form_of(self.layer.sub.residual).adds


@dataclass(frozen=True)
class Edge:
    """tensor: "x" the residual stream (all of them, side by side), "x0" the first embedding carried past it, "t" what
    the layer before gave aside of it, "h" the hidden state after a final norm, which the next depth of `mtp` reads,
    "next" the embedding of the next token, for the same; other names are what kinds give and take. width: elements per
    token."""

    source: str
    target: str
    tensor: str
    width: int


class Streams(NamedTuple):
    """Residual streams side by side that a node reads and that it gives."""

    read: int
    given: int


def streams(nodes: Iterable[Node]) -> dict[str, Streams]:
    """By path, of nodes that stand in this order. A chain, the stack or a depth of `mtp`, begins with the streams that
    the first layer says, which all others agree with (E710); a layer that begins a block has one more behind it."""
    nodes = tuple(nodes)
    first = next((node for node in nodes if node.role is Role.LAYER), None)
    start = n = streams_of(first.layer.sub) if first else 1
    found = {}
    for node in nodes:
        match node.role:
            case Role.EMBED | Role.MTP_IN:
                found[node.path], n = Streams(1, start), start
            case Role.LAYER:
                more = n + bool(begins(node.layer.sub))
                found[node.path], n = Streams(n, more), more
            case Role.HEAD | Role.MTP_OUT:
                found[node.path] = Streams(n, 1)
    return found


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """nodes are in an order in which they can run. tied: the head uses the embedding's weights."""

    name: str
    model: Values
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    mtp: MtpSpec | None = None
    parts: tuple[PartsSpec, ...] = ()
    expects: tuple[ExpectSpec, ...] = ()
    file: tree.File | None = field(default=None, repr=False)

    @cached_property
    def by_path(self) -> dict[str, Node]:
        return {node.path: node for node in self.nodes}

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        """The sublayers of the stack, in order (without embedding, head and MTP)."""
        return tuple(n for n in self.nodes if n.role is Role.LAYER and n.path.startswith("stack."))

    @cached_property
    def reads(self) -> dict[str, frozenset[str]]:
        """The tensors that each node reads, by its path."""
        found: dict[str, set[str]] = {node.path: set() for node in self.nodes}
        for edge in self.edges:
            found[edge.target].add(edge.tensor)
        return {path: frozenset(names) for path, names in found.items()}

    @cached_property
    def carried(self) -> frozenset[str]:
        """The names of what kinds give and other layers take."""
        d = self.model.d_model
        return frozenset(e.tensor for e in self.edges if e.tensor in self.by_path[e.source].gives(d))

    @property
    def tied(self) -> bool:
        return self.model.tie_embeddings

    @cached_property
    def streams(self) -> dict[str, Streams]:
        """The residual streams that each node reads and gives, by its path."""
        return streams(self.nodes)

    @property
    def blocks(self) -> bool:
        """Its streams are the states at which blocks of layers began, of which a layer changes none but the last."""
        return bool(self.layers) and begins(self.layers[0].layer.sub) is not None

    @cached_property
    def most_streams(self) -> dict[str, int]:
        """For each owner of a layer, the most streams that a use of it reads: what its weights are made for."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node.owner] = max(found.get(node.owner, 1), self.streams[node.path].read)
        return found

    @property
    def residual_additions(self) -> int:
        """How many times something is added to the stack's residual stream."""
        return sum(not node.aside for node in self.layers)

    @cached_property
    def depths(self) -> dict[str, tuple[int, int]]:
        """For each owner of a layer, how many layers of the stack that mix tokens (that have a decoding state, or take
        what such a layer gives) come before its first use, and how many there are. Layers of the MTP tail stand where
        the last of them does."""
        before: dict[str, int] = {}
        mixing: set[str] = set()
        givers: dict[str, set[str]] = {}
        for edge in self.edges:
            if edge.tensor in self.carried:
                givers.setdefault(edge.target, set()).add(edge.source)
        for node in self.layers:
            before.setdefault(node.owner, len(mixing))
            dims = node.dims(self.model.d_model)
            own = any(get(mixer.kind).state(mixer.fields, dims) for mixer in node.layer.branches)
            if own or mixing & givers.get(node.path, set()):
                mixing.add(node.path)
        count = len(mixing)
        last = max(count - 1, 0)
        return {n.owner: (before.get(n.owner, last), count) for n in self.nodes if n.role is Role.LAYER}

    @cached_property
    def places(self) -> dict[str, int]:
        """For each owner of a layer, which layer its first use is, from 0."""
        found: dict[str, int] = {}
        for i, node in enumerate(node for node in self.nodes if node.role is Role.LAYER):
            found.setdefault(node.owner, i)
        return found

    def content(self) -> dict[str, Any]:
        """What the graph is; equal graphs have equal content."""
        return {
            "name": self.name,
            "model": self.model,
            "nodes": tuple((n.path, n.role, n.layer, n.owner, n.cut_after) for n in self.nodes),
            "edges": tuple(sorted((e.source, e.target, e.tensor, e.width) for e in self.edges)),
            "mtp": self.mtp.settings if self.mtp else None,
            "parts": self.parts,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerGraph) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash((self.name, self.model, len(self.nodes)))
