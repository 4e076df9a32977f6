"""What a run was predicted to hold and take, beside what it did: in the run's last words, and in RUN/compared.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mambadsl.data.cache import whole
from mambadsl.train.forecast import Forecast
from mambadsl.train.save import COMPARED
from mambadsl.train.watch import Watch
from mambadsl.train.world import World


@dataclass(frozen=True, slots=True)
class Row:
    """unit: "s", "tokens/s", "bytes", or "share". predicted: None where a nominal device cannot tell. measured: None
    where it cannot be known. ranks: that are alike."""

    what: str
    unit: str
    predicted: float | None
    measured: float | None
    ranks: tuple[int, ...] = ()

    @property
    def off(self) -> float | None:
        """How far the run was from the prediction, as a part of that; of a share, in parts of the whole."""
        if self.measured is None or self.predicted is None:
            return None
        if self.unit == "share":
            return self.measured - self.predicted
        return self.measured / self.predicted - 1 if self.predicted else None


@dataclass(frozen=True, slots=True)
class Action:
    """Of one kind of a stage's actions, on the mean: seconds that it takes, and that its rank waits before it.
    predicted: None where a nominal device cannot tell, and of what is not in the plan."""

    stage: int
    kind: str
    predicted: tuple[float, float] | None
    measured: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """device: the planner's. nominal: its numbers are no particular machine's, and its times are left out.
    actions: of a pipeline's stages, on their first ranks."""

    device: str
    nominal: bool
    rows: tuple[Row, ...]
    actions: tuple[Action, ...] = ()

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ranks": list(row.ranks), "off": row.off} for row in self.rows]
        actions = [
            {
                "stage": a.stage, "kind": a.kind, "measured_s": a.measured[0], "measured_wait_s": a.measured[1],
                "predicted_s": a.predicted and a.predicted[0], "predicted_wait_s": a.predicted and a.predicted[1],
            }
            for a in self.actions
        ]
        return {"device": self.device, "nominal": self.nominal, "rows": rows, "actions": actions}

    def write(self, run: Path) -> None:
        with whole(run / COMPARED) as out:
            out.write((json.dumps(self.to_json(), indent=1) + "\n").encode())


def compare(forecast: Forecast, watch: Watch, step_s: float, world: World) -> Comparison:
    """step_s: the median of this rank's. All ranks come here together."""
    cuda, nominal = world.device.type == "cuda", forecast.device == "cpu"
    own = watch.bubble(), watch.actions(), torch.cuda.max_memory_allocated(world.device) if cuda else None
    everyone = world.gathered(own)

    def known(seconds: float) -> float | None:
        return None if nominal else seconds

    rows = [
        Row("step", "s", known(forecast.step_s), step_s),
        Row("tokens a second", "tokens/s", known(forecast.tokens_per_s), forecast.tokens / step_s),
    ]
    if (layers_s := watch.layers_s()) is not None:
        besides = forecast.optimizer_s
        rows.append(Row("forwards, backwards", "s", known(forecast.step_s - besides), layers_s))
        rows.append(Row("norm, optimizer", "s", known(besides), max(0.0, step_s - layers_s)))
    if forecast.mesh[0] > 1:
        spans = [times for times, *_ in everyone if times]
        bubble = 1 - sum(work for work, _ in spans) / sum(whole for _, whole in spans) if spans else None
        rows.append(Row("bubble", "share", forecast.bubble, bubble))
    for held in forecast.held:
        most = max(everyone[rank][2] for rank in held.ranks) if cuda else None
        rows.append(Row("peak memory", "bytes", held.peak, most, held.ranks))
    planned = {} if nominal else {(spent.stage, spent.kind): (spent.seconds, spent.wait_s) for spent in forecast.spent}
    measured = {}
    for _, actions, _ in reversed(everyone):
        measured |= actions
    found = (Action(*what, planned.get(what), times) for what, times in sorted(measured.items()))
    return Comparison(forecast.device, nominal, tuple(rows), tuple(found))
