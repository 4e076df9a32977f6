"""What a run was predicted to hold and take, beside what it did: in the run's last words, and in RUN/compared.json."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mambadsl.train.forecast import Forecast
from mambadsl.train.watch import Watch
from mambadsl.train.world import World

FILE = "compared.json"


@dataclass(frozen=True, slots=True)
class Row:
    """unit: "s", "tokens/s", "bytes", or "share". measured: None where it cannot be known. ranks: that are alike."""

    what: str
    unit: str
    predicted: float
    measured: float | None
    ranks: tuple[int, ...] = ()

    @property
    def off(self) -> float | None:
        """How far the run was from the prediction, as a part of that; of a share, in parts of the whole."""
        if self.measured is None:
            return None
        if self.unit == "share":
            return self.measured - self.predicted
        return self.measured / self.predicted - 1 if self.predicted else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """device: the planner's. nominal: its numbers are no particular machine's."""

    device: str
    nominal: bool
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ranks": list(row.ranks), "off": row.off} for row in self.rows]
        return {"device": self.device, "nominal": self.nominal, "rows": rows}

    def write(self, run: Path) -> None:
        part = run / f"{FILE}.part"
        part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, run / FILE)


def compare(forecast: Forecast, watch: Watch, step_s: float, world: World) -> Comparison:
    """step_s: the median of this rank's. All ranks come here together."""
    cuda = world.device.type == "cuda"
    own = watch.bubble(), torch.cuda.max_memory_allocated(world.device) if cuda else None
    everyone = world.gathered(own)
    rows = [
        Row("step", "s", forecast.step_s, step_s),
        Row("tokens a second", "tokens/s", forecast.tokens_per_s, forecast.tokens / step_s),
    ]
    if forecast.mesh[0] > 1:
        spans = [times for times, _ in everyone if times]
        bubble = 1 - sum(work for work, _ in spans) / sum(whole for _, whole in spans) if spans else None
        rows.append(Row("bubble", "share", forecast.bubble, bubble))
    for held in forecast.held:
        most = max(everyone[rank][1] for rank in held.ranks) if cuda else None
        rows.append(Row("peak memory", "bytes", held.peak, most, held.ranks))
    return Comparison(forecast.device, forecast.device == "cpu", tuple(rows))
