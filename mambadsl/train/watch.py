"""How long a rank's stages compute in a step, of a few steps of a run: the rest is the pipeline's bubble.

Marks before and after each forward and backward of a stage, which come after what was received; no waiting for the
device, and nothing at all after the steps that are watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mambadsl.train.clock import Clock
from mambadsl.train.engine import Engine, Pipelined
from mambadsl.train.world import World

#: Steps before those that are watched, and those: the first ones compile, and find out how kernels run best.
BEFORE, WATCHED = 3, 5
#: What torch's stages do for an action.
ACTIONS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


class Watch:
    def __init__(self, engine: Engine, world: World):
        self.clock, self.steps = Clock(world.device), 0
        self.spans: list[tuple[Any, Any]] = []
        self.work: list[tuple[Any, Any]] = []
        if isinstance(engine, Pipelined):
            self.engine, self.stages, self.run = engine, engine.schedule._stages, engine.forward_backward
            engine.forward_backward = self._step

    def bubble(self) -> tuple[float, float] | None:
        """Seconds of work and of all, of the watched steps; None if there are none."""
        if not self.spans:
            return None
        work, whole = (sum(self.clock.between(*pair) for pair in pairs) for pairs in (self.work, self.spans))
        return work, whole

    def _step(self, *args: Any) -> Any:
        self.steps += 1
        if self.steps <= BEFORE:
            return self.run(*args)
        for stage in self.stages:
            for name in ACTIONS:
                setattr(stage, name, self._marked(getattr(stage, name), self.work))
        try:
            return self._marked(self.run, self.spans)(*args)
        finally:
            for stage in self.stages:
                for name in ACTIONS:
                    delattr(stage, name)
            if self.steps == BEFORE + WATCHED:
                del self.engine.forward_backward

    def _marked(self, function: Callable, into: list) -> Callable:
        def marked(*args: Any, **how: Any) -> Any:
            begun = self.clock.mark()
            given = function(*args, **how)
            into.append((begun, self.clock.mark()))
            return given

        return marked
