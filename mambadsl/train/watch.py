"""What a rank does in a step, of a few steps of a run: how long its forwards and backwards take together, and in a
pipeline each action of its stages and what passes before it begins, which is the bubble.

Marks before and after each action of a stage, which come after what was received; no waiting for the device, and
nothing at all after the steps that are watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mambadsl.plan.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from mambadsl.train.clock import Clock
from mambadsl.train.engine import Engine, Pipelined
from mambadsl.train.world import World

#: Steps before those that are watched, and those: the first ones compile, and find out how kernels run best.
BEFORE, WATCHED = 3, 5
#: What torch's stages do for an action; at the end of a step, gradients are reduced.
REDUCE = "reduce"
ACTIONS = {
    "forward_one_chunk": FORWARD, "backward_one_chunk": BACKWARD, "backward_weight_one_chunk": BACKWARD_WEIGHT,
    "perform_reduce_grad": REDUCE,
}


class Watch:
    def __init__(self, engine: Engine, world: World):
        self.clock, self.steps = Clock(world.device), 0
        self.spans: list[tuple[Any, Any]] = []
        #: (stage, kind), and the two moments of each action, of all watched steps in the order in which they were.
        self.work: list[tuple[tuple[int, str], Any, Any]] = []
        self.engine, self.run = engine, engine.forward_backward
        self.stages = engine.schedule._stages if isinstance(engine, Pipelined) else []
        engine.forward_backward = self._step

    def layers_s(self) -> float | None:
        """Mean seconds of a step's forwards and backwards; None if none was watched."""
        spans = [self.clock.between(*pair) for pair in self.spans]
        return sum(spans) / len(spans) if spans else None

    def bubble(self) -> tuple[float, float] | None:
        """Seconds of work and of all, of the watched steps of a pipeline; None if there are none."""
        if not self.spans or not self.work:
            return None
        whole = sum(self.clock.between(*pair) for pair in self.spans)
        return sum(self.clock.between(*pair) for _, *pair in self.work), whole

    def actions(self) -> dict[tuple[int, str], tuple[float, float]]:
        """(stage, kind) -> seconds that an action of it takes, and that pass before it begins, on the mean."""
        found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        each = len(self.work) // len(self.spans) if self.spans else 0
        for k, (what, begun, ended) in enumerate(self.work):
            before = self.spans[k // each][0] if k % each == 0 else self.work[k - 1][2]
            found.setdefault(what, []).append((self.clock.between(begun, ended), self.clock.between(before, begun)))
        return {what: tuple(sum(n) / len(n) for n in zip(*times)) for what, times in sorted(found.items())}

    def _step(self, *args: Any) -> Any:
        self.steps += 1
        if self.steps <= BEFORE:
            return self.run(*args)
        splits = any(stage.dw_builder is not None for stage in self.stages)
        for stage in self.stages:
            for name, kind in ACTIONS.items():
                kind = BACKWARD_INPUT if splits and kind == BACKWARD else kind
                setattr(stage, name, self._marked(getattr(stage, name), (stage.stage_index, kind)))
        try:
            begun = self.clock.mark()
            given = self.run(*args)
            self.spans.append((begun, self.clock.mark()))
            return given
        finally:
            for stage in self.stages:
                for name in ACTIONS:
                    delattr(stage, name)
            if self.steps == BEFORE + WATCHED:
                del self.engine.forward_backward

    def _marked(self, function: Callable, what: tuple[int, str]) -> Callable:
        def marked(*args: Any, **how: Any) -> Any:
            begun = self.clock.mark()
            given = function(*args, **how)
            self.work.append((what, begun, self.clock.mark()))
            return given

        return marked
