"""Where a loss or a gradient stopped being a number: a weight that is none, the first layer whose output has one that
is not finite, or the last whose gradient has.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mambadsl.build.failure import notes
from mambadsl.data.rows import Batch
from mambadsl.graph.graph import Node
from mambadsl.train.engine import Engine
from mambadsl.train.held import local
from mambadsl.train.pieces import Piece
from mambadsl.train.world import World


class NotFinite(RuntimeError):
    """The run has stopped before the update of a step whose numbers went wrong."""


class Alone(RuntimeError):
    """What ends one rank, and the others for want of it: it tells why itself."""


def explain(step: int, loss: float, norm: float, engine: Engine, batch: Batch, counts_K: Tensor, world: World) -> str:
    """Why step `step` cannot be done. Runs its forward pass again, watching every layer; every rank calls it."""
    # The forward pass first: ranks do it together.
    passed = _forward(engine, batch, counts_K)
    told = world.gathered(_weight(engine.pieces) or passed or _gradient(engine.pieces))
    what = f"step {step}: the loss is {loss}" if loss != loss or abs(loss) == float("inf") else (
        f"step {step}: the norm of the gradients is {norm}"
    )
    # A weight spoils all after it. The forward pass meets the earliest layer first, the backward pass the latest.
    seen = sorted((one for one in told if one is not None), key=lambda one: one[:2])
    return "\n".join([what, *(seen[0][2] if seen else ["no layer's output and no gradient shows it now"])])


def _weight(pieces: Sequence[Piece]) -> tuple[int, int, list[str]] | None:
    """As of weights that a run began with, or an update that went past what float32 has."""
    for made in pieces:
        nodes = list(enumerate(made.model.graph.nodes))
        for path, p in made.model.named_parameters():
            if not bool(local(p).isfinite().all()):
                at, node = next(((k, n) for k, n in nodes if path.startswith(n.owner + ".")), (len(nodes), None))
                return -1, at, [f"the weight `{path}` is not finite", *(notes(node) if node else [])]
    return None


def _forward(engine: Engine, batch: Batch, counts_K: Tensor) -> tuple[int, int, list[str]] | None:
    bad: list[tuple[int, Node]] = []

    def watch(order: int, node: Node):
        def hook(_module, _inputs, output):
            if not bad and not all(bool(t.isfinite().all()) for t in tree_leaves(output) if isinstance(t, Tensor)):
                bad.append((order, node))

        return hook

    handles = []
    for made in engine.pieces:
        order = {node.path: k for k, node in enumerate(made.model.graph.nodes)}
        for node, sublayer in made.model.sublayers():
            handles.append(sublayer.register_forward_hook(watch(order[node.path], node)))
    try:
        engine.evaluate(batch, counts_K)
    finally:
        for handle in handles:
            handle.remove()
    if not bad:
        return None
    order, node = bad[0]
    return 0, order, ["the first output that is not finite", *notes(node)]


def _gradient(pieces: Sequence[Piece]) -> tuple[int, int, list[str]] | None:
    for made in reversed(pieces):
        named = dict(made.model.named_parameters())
        for k, node in reversed(list(enumerate(made.model.graph.nodes))):
            prefix = node.owner + "."
            for path, p in named.items():
                if path.startswith(prefix) and p.grad is not None and not bool(local(p.grad).isfinite().all()):
                    return 1, -k, [f"the gradient of `{path}` is not finite", *notes(node)]
    return None
