"""A training run: steps from where the last save left off to the last one, and what happens between them.

In: a graph, rows, settings, a folder. Out: a `Result`; the folder has the log and the saves. A step depends on the
weights and its number alone (samples, learning rate and dropout are functions of it), so a run that was stopped
anywhere goes on as if it had not been. Refuses (ValueError) a folder whose run has other settings, another model or
other data, or saves of which none can be read; (MdlError, E905) weights to begin with that are not the model's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mambadsl.build.checkpoint import stored_weights
from mambadsl.build.loss import IGNORE, counts
from mambadsl.data.rows import Batch, Rows
from mambadsl.graph.cost import costs, total
from mambadsl.graph.graph import LayerGraph
from mambadsl.plan.plan import Plan
from mambadsl.train import balance
from mambadsl.train.compare import Comparison, compare
from mambadsl.train.engine import Engine, engine
from mambadsl.train.failure import Alone, NotFinite, explain
from mambadsl.train.forecast import Forecast
from mambadsl.train.gradients import Gradients
from mambadsl.train.log import Log
from mambadsl.train.match import about, check, rebalanced
from mambadsl.train.optimizer import Optimizer
from mambadsl.train.peak import peak_flops
from mambadsl.train.pieces import put
from mambadsl.train.save import Saver, newest, read
from mambadsl.train.settings import Settings
from mambadsl.train.slices import told
from mambadsl.train.stop import Stop
from mambadsl.train.tables import compared_text
from mambadsl.train.watch import Watch
from mambadsl.train.world import World


@dataclass(frozen=True, slots=True)
class Result:
    """step: done. ended: "done", or the signal that stopped it: "SIGTERM", "SIGINT", "SIGHUP". loss: of the last step,
    None if none was left to do; held_out: the last one measured. unsaved: why the last save is not there, if it is not.
    step_s: the median, without the first steps. compared: with what was predicted."""

    step: int
    ended: str
    loss: float | None
    held_out: float | None
    unsaved: str | None
    step_s: float | None
    compared: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "compared": self.compared and self.compared.to_json()}


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is written when: every so many steps, 0 for never. saves: complete ones that are left; 0: none is made."""

    save_every: int = 500
    saves: int = 2
    held_out_every: int = 500
    tensorboard: bool = False
    quiet: bool = False


def beforehand(graph: LayerGraph, rows: Rows, settings: Settings, forecast: Forecast | None) -> list[str]:
    """What is to be said of a run, dry or not, before it begins."""
    facts = rows.corpus.says, forecast and forecast.doubt
    return [*filter(None, facts), *balance.told(graph), *told(graph, settings.tensor)]


class Run:
    """One rank's part of a run. Letters: B rows of this rank, T time, K losses (the head's, and of each depth)."""

    def __init__(
        self, graph: LayerGraph, rows: Rows, settings: Settings, folder: Path, *, world: World,
        plan: Plan | None = None, keeping: Keeping = Keeping(), weights: Path | None = None,
        forecast: Forecast | None = None,
    ):
        """weights: a folder of safetensors to begin with; a run that has a save goes on from that."""
        self.graph, self.rows, self.settings, self.folder = graph, rows, settings, folder
        self.world, self.keeping = world, keeping
        self.about = about(graph, rows, settings, world=world.size)
        # As the first rank finds it: a disk may show the others an earlier state.
        saved, doubts = world.gathered(newest(folder) if world.first else None)[0]
        with world.agreed():
            if saved is not None:
                if isinstance(doubt := read(saved.folder), str):
                    raise ValueError(f"{doubt}: the folder of a run must be the same one for all machines")
                check(saved, graph, self.about)
            elif doubts:
                raise ValueError("\n".join([f"no save of `{folder}` can be read:", *(f"  {line}" for line in doubts)]))
            begun = stored_weights(graph, weights) if weights is not None and saved is None else None
            self.each, _ = settings.rows(world.ranks("data"))
            self.engine: Engine = engine(graph, world, settings, plan)
        self.forecast, self.watch = forecast, Watch(self.engine, world)
        if begun is not None:
            for made in self.engine.pieces:
                put(made, ((path, begun.value(path)) for path in made.model.tensors()))
        self.depths = self.engine.pieces[-1].model.trained_depths
        self.gradients = Gradients(self.engine.pieces, world)
        self.balance = balance.Balance(self.engine.pieces, world, settings)
        self.optimizer = Optimizer(self.engine.pieces, settings, fused=world.device.type == "cuda")
        self.saver = Saver(folder, world, self.engine.pieces, self.optimizer, keep=keeping.saves)
        self.start = 0
        self.notes = beforehand(graph, rows, settings, forecast)
        self.notes += [f"passed over: {doubt}" for doubt in doubts]
        if saved is not None:
            self.start = self.saver.load(saved)
            self.notes.append(f"goes on after step {self.start:,}, from `{saved.folder}`")
            self.notes += rebalanced(saved, self.about)
            if weights is not None:
                self.notes.append(f"`{weights}` is not read again: the run has begun")
        # Only now: what was loaded is good.
        if trouble := self.saver.tidy():
            self.notes.append(trouble)

    def train(self, stop: Stop) -> Result:
        """Every step that is left. NotFinite where one cannot be done."""
        settings, world, keeping = self.settings, self.world, self.keeping
        with world.agreed():
            log = self._log() if world.first else None
        tell: Callable[[str], None] = log.say if log else lambda line: None
        step, loss, held_out, unsaved, ended, times = self.start, None, None, None, None, []
        meter = Meter(self.graph, settings, world)
        try:
            for note in self.notes:
                tell(note)
            while step < settings.steps and ended is None:
                begun = time.perf_counter()
                facts = self.step(step)
                loss = facts["loss"]
                times.append(time.perf_counter() - begun)
                step += 1
                if log:
                    log.step(step, {**facts, **meter.facts(times[-1])})
                ended = "done" if step == settings.steps else stop.asked(world)
                if self.rows.held_out_count and (_due(step, keeping.held_out_every) or ended == "done"):
                    held_out = self.held_out()
                    if log:
                        log.held_out(step, held_out)
                # A save that failed is told, and tried again when the next is due.
                troubles = [self.saver.finish(wait=False)]
                if keeping.saves and (_due(step, keeping.save_every) or ended):
                    troubles.append(self.saver.start(step, self.about))
                if ended:
                    unsaved = next(filter(None, world.gathered(self.saver.finish())), None)
                    troubles.append(unsaved)
                for trouble in filter(None, troubles):
                    tell(trouble)
        except (NotFinite, ValueError) as error:
            # What is being written is of a step before.
            if trouble := self.saver.finish():
                tell(trouble)
            if isinstance(error, ValueError):  # Data that was changed meanwhile.
                raise Alone(f"rank {world.rank}, step {step + 1}: {error}") from None
            raise
        finally:
            if log:
                log.__exit__(None, None, None)
        steady = sorted(times[min(3, len(times) // 2) :])
        step_s = steady[len(steady) // 2] if steady else None
        compared = compare(self.forecast, self.watch, step_s, world) if self.forecast and step_s else None
        if compared and world.first:
            try:
                compared.write(self.folder)
            except OSError as error:
                tell(f"the comparison cannot be written: {error.strerror or error}")
            tell("\n" + compared_text(compared))
        return Result(step, ended or "done", loss, held_out, unsaved, step_s, compared)

    def _log(self) -> Log:
        keeping = self.keeping
        try:
            return Log(
                self.folder, steps=self.settings.steps, start=self.start, quiet=keeping.quiet,
                tensorboard=keeping.tensorboard,
            )
        except OSError as error:
            raise ValueError(f"the log in `{self.folder}` cannot be written: {error.strerror or error}") from None

    def step(self, step: int) -> dict[str, float]:
        """The `step`-th update, counted from 0: its loss, the norm of its gradients, its learning rate, and of experts
        how balanced they are."""
        batch = self._mine(self.rows.training, step * self.settings.batch)
        counts_K = self._counts(batch)
        self._seed(step)
        self.gradients.clear()
        self.balance.clear()
        share = self.engine.forward_backward(batch, counts_K)
        self.gradients.add_up()
        norm = self.gradients.norm()
        both = torch.stack([self._whole(share).double(), norm.double()])
        told = torch.cat((both, self.balance.add_up())).cpu()
        loss, grad_norm = told[:2].tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NotFinite(explain(step + 1, loss, grad_norm, self.engine, batch, counts_K, self.world))
        self.gradients.clip(norm, self.settings.clip)
        lr = self.optimizer.step(step)
        self.balance.update(told[2:])
        return dict(loss=loss, grad_norm=grad_norm, lr=lr, **self.balance.facts(told[2:]))

    def held_out(self) -> float:
        """The mean loss over all rows that are held out, as the training's (with `mtp`, its part included)."""
        total, tokens = 0.0, 0.0
        for first in range(0, self.rows.held_out_count, self.settings.batch):
            batch = self._mine(self._held_out_rows, first)
            counts_K = self._counts(batch)
            total += self._whole(self.engine.evaluate(batch, counts_K)).item() * counts_K[0].item()
            tokens += counts_K[0].item()
        return total / max(1.0, tokens)

    def _held_out_rows(self, first: int, count: int) -> Batch:
        """Past the last, rows without targets."""
        there = max(0, min(count, self.rows.held_out_count - first))
        found = self.rows.held_out(min(first, self.rows.held_out_count - 1), max(1, there))
        if there == count:
            return found
        fill = count - len(found.tokens_BT)
        tokens, targets, segments = (
            torch.cat((t, t[:1].expand(fill, -1))) for t in (found.tokens_BT, found.targets_BT, found.segments_BT)
        )
        targets[there:] = IGNORE
        return Batch(tokens, targets, segments)

    def _mine(self, rows: Callable[[int, int], Batch], first: int) -> Batch:
        """This data rank's rows of the `batch` from `first` on."""
        found = rows(first + self.world.at("data") * self.each, self.each)
        # Rows of one document each: layers have less to do where nobody says so.
        segments_BT = found.segments_BT if found.segments_BT.any() else None
        tensors = (found.tokens_BT, found.targets_BT, segments_BT)
        return Batch(*(t if t is None else t.to(self.world.device, non_blocking=True) for t in tensors))

    def _counts(self, batch: Batch) -> Tensor:
        counts_K = counts(batch.targets_BT, depths=self.depths, segments=batch.segments_BT)
        if self.world.ranks("data") > 1:
            dist.all_reduce(counts_K, group=self.world.group("data"))
        return counts_K

    def _whole(self, share: Tensor) -> Tensor:
        """The sum of all ranks' shares; only those with the head have one."""
        for axis in ("pipeline", "data"):
            if self.world.ranks(axis) > 1:
                dist.all_reduce(share, group=self.world.group(axis))
        return share

    def _seed(self, step: int) -> None:
        """Dropout draws by the step and the rank's place, not by what was drawn before."""
        place = self.world.at("data") * self.world.ranks("pipeline") + self.world.at("pipeline")
        torch.manual_seed(((self.settings.seed << 40) ^ (step << 12) ^ place) % 2**63)


class Meter:
    """Tokens per second and what they take of the devices."""

    def __init__(self, graph: LayerGraph, settings: Settings, world: World):
        flops = total(costs(graph, length=settings.length)).flops
        self.tokens = settings.batch * settings.length
        self.flops = float(flops.forward + flops.backward_input + flops.backward_weight) * self.tokens
        self.peak = peak_flops(world.device, settings.dtype)
        self.device, self.size = world.device, world.size

    def facts(self, seconds: float) -> dict[str, float]:
        found: dict[str, Any] = {"tokens_per_s": self.tokens / seconds, "step_s": seconds}
        if self.peak:
            found["peak_share"] = self.flops / seconds / (self.peak * self.size)
        if self.device.type == "cuda":
            found["memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
