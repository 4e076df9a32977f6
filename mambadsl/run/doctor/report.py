"""Everything `mambadsl doctor` finds: environment, packages, parts held to the reference -> `Report`, text, data.

Refuses (KeyError) packages that do not exist. Nothing that is asked runs in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from mambadsl.parts import registry
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import Package, Part
from mambadsl.run.doctor import environment, packages
from mambadsl.run.doctor.child import all_ended, ask
from mambadsl.run.doctor.environment import Environment
from mambadsl.run.doctor.packages import Loaded

#: Of one slot: kernels are compiled first.
SLOT_LIMIT_S = 150
#: Side by side: most of their time is imports and compilers, on one core each.
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))

One, Found = TypeVar("One"), TypeVar("Found")

#: What is wrong with a part, of the states that `kernels.check` and a process's end have.
BROKEN = ("wrong", "failed", "crashed", "no end")


@dataclass(frozen=True)
class Tried:
    """One part in one slot, in one dtype ("" where it did not come so far).

    status: "ok"; "wrong", "failed", "crashed", "no end"; "refused", "not here" (the machine or a package is missing).
    Errors are relative to the reference in the same dtype; None where unknown.
    """

    part: str
    slot: str
    status: str
    dtype: str = ""
    detail: str = ""
    forward_error: float | None = None
    gradients_error: float | None = None
    decoding_error: float | None = None
    ms: float | None = None
    reference_ms: float | None = None
    first_s: float | None = None


@dataclass(frozen=True)
class Report:
    environment: Environment
    packages: tuple[Loaded, ...]
    tried: tuple[Tried, ...]

    @property
    def ok(self) -> bool:
        """Nothing that is installed is broken."""
        return not any(p.broken for p in self.packages) and not any(t.status in BROKEN for t in self.tried)


def examine(
    names: Iterable[str] = (), *, quick: bool = False, tell: Callable[[str], None] = lambda words: None
) -> Report:
    """names: packages (default: all). quick: kernels are not run. tell: called with what is looked at next."""
    every = registry.packages()
    wanted = [every[name] for name in dict.fromkeys(names)] or list(every.values())
    tell("looking at Python, torch and the GPU")
    here = environment.look()
    needed = (every[n] for package in wanted for part in package.parts for n in part.needs if n in every)

    def look(package: Package) -> Loaded:
        tell(f"loading {package.name}")
        return packages.look(package, cuda=here.facts.get("torch_cuda"))

    distinct = {package.name: package for package in (*wanted, *needed)}
    loaded = dict(zip(distinct, _side_by_side(look, distinct.values())))

    def hold(part: Part) -> list[Tried]:
        if why := _not_here(part, here.machine, loaded):
            return [Tried(part.name, slot, "not here", detail=why) for slot in part.slots]
        tell(f"trying {part.name}")
        return list(try_part(part.name, part.slots))

    parts = () if quick else [part for package in wanted for part in package.parts]
    tried = tuple(row for rows in _side_by_side(hold, parts) for row in rows)
    return Report(here, tuple(loaded[package.name] for package in wanted), tried)


def _side_by_side(function: Callable[[One], Found], items: Iterable[One]) -> list[Found]:
    """Results in the order of the items. What ends this ends the processes that were asked, too."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            with all_ended():
                pool.shutdown(cancel_futures=True)
            raise


def _not_here(part: Part, here: Machine, loaded: dict[str, Loaded]) -> str:
    if here.device not in part.devices:
        return "needs a GPU" if here.device == "cpu" else f"runs on {', '.join(part.devices)}"
    if here.capability and here.device == "cuda" and here.capability < part.capability:
        return f"needs compute capability {'.'.join(map(str, part.capability))}"
    missing = [name for name in (part.package, *part.needs) if name in loaded and not loaded[name].ok]
    return f"needs {', '.join(missing)}" if missing else ""


def try_part(part: str, slots: tuple[str, ...], *, limit_s: float = SLOT_LIMIT_S) -> Iterator[Tried]:
    """Holds the part to the reference in another process; after a crash, the slots left in one more.
    limit_s: for each slot."""
    while slots:
        ended = ask("try", part, *slots, limit_s=limit_s * len(slots))
        yield from (Tried(**answer) for answer in ended.answers if "trying" not in answer)
        if ended.code == 0:
            return
        guilty = next((a["trying"] for a in reversed(ended.answers) if "trying" in a), slots[0])
        if ended.code is None:
            yield Tried(part, guilty, "no end", detail=f"nothing more after {limit_s * len(slots):.0f} s")
        else:
            said = filter(None, (ended.signal or f"exit {ended.code}", packages.last_line(ended.error)))
            yield Tried(part, guilty, "crashed", detail="; ".join(said))
        slots = slots[slots.index(guilty) + 1 :]


def report_data(report: Report) -> dict[str, Any]:
    """Plain data, all of it."""
    e = report.environment
    return {
        "environment": {**vars(e), "remarks": list(e.remarks)},
        "packages": [
            {
                "name": p.package.name, "version": p.version, "tested": p.package.tested, "state": p.state,
                "error": p.error, "fix": list(p.fix), "install": p.package.install, "seconds": p.seconds,
            }
            for p in report.packages
        ],
        "parts": [vars(row) for row in report.tried],
    }
