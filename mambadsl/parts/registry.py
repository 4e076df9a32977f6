"""Which packages and parts there are: folders here with a package.py, installed plugins, files given by `--load`.

Plugins are looked for when a name is unknown, or everything is listed, and no sooner: that takes Python some 20 ms.
What a plugin holds: plugins.py.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from mambadsl.kinds import registry as kinds
from mambadsl.kinds.kind import Slot
from mambadsl.parts.part import Package, Part

#: Slots around the layers: owner `model`.
FRAME = (
    Slot("norm", "every norm of the residual stream, (x, weight, *, eps, zero_centered, dtype); RMS norms only"),
    Slot("loss", "final hidden states and the head's weight -> mean cross entropy, (x, weight, targets, *, ...)"),
    Slot(
        "embed_step", "the stream of one token in decoding, (token_B, weight_VD, *, multiplier, dtype) -> [B, D]",
        optional=True,
    ),
    Slot(
        "head_step",
        "final norm and logits of one token in decoding, (norm, x_BD, weight_VD, *, multiplier, softcap) -> float32 "
        "logits [B, V]", optional=True,
    ),
    Slot(
        "next_token",
        "the most likely token of each row, (logits_BV, token_B, history_TB, written_1): into token_B and into the "
        "history at written_1, which is counted up", optional=True,
    ),
)

_own: dict[str, Package] = {}


class NoSlot(ValueError):
    """slot: what a part says it fills."""

    def __init__(self, part: str, slot: str):
        super().__init__(f"the part `{part}` fills `{slot}`, and there is no such slot")
        self.slot = slot


def slots_of(owner: str) -> tuple[Slot, ...]:
    """The slots of a kind, or of `model`. KeyError if there is neither."""
    return FRAME if owner == "model" else kinds.get(owner).slots


def is_owner(name: str) -> bool:
    """Whether something called so has slots: a kind, or `model`."""
    return name == "model" or kinds.known(name)


def all_slots() -> tuple[str, ...]:
    """`model.norm`, `mamba2.scan`, ... of the kinds known so far."""
    return tuple(f"{owner}.{slot.name}" for owner in ("model", *kinds.names()) for slot in slots_of(owner))


@cache
def _shipped() -> tuple[str, ...]:
    """Folders are called as their packages."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/package.py")))


def package(name: str) -> Package | None:
    """The package of that name; only its own tables are imported."""
    if name in _shipped():
        return import_module(f"mambadsl.parts.{name}.package").PACKAGE
    if name not in _own:
        plugins()
    return _own.get(name)


def packages() -> dict[str, Package]:
    """Every package by name, plugins' too."""
    plugins()
    return {name: package(name) for name in (*_shipped(), *_own)}


def part(name: str) -> Part | None:
    """The part called `package.part`."""
    found = package(name.partition(".")[0])
    return next((p for p in found.parts if p.name == name), None) if found else None


def parts_for(slot: str) -> tuple[Part, ...]:
    """Every part that can fill the slot."""
    return tuple(p for package in packages().values() for p in package.parts if slot in p.slots)


def add(package: Package) -> None:
    """Registers a user's package. ValueError if the name is taken, a part is called otherwise or twice, or fills a
    slot that does not exist."""
    if package.name in _shipped() or _own.get(package.name, package) is not package:
        raise ValueError(f"there is a package of parts called `{package.name}` already")
    named = [p.name for p in package.parts]
    for p in package.parts:
        if p.package != package.name or p.name.count(".") != 1:
            raise ValueError(f"the part `{p.name}` must be called `{package.name}.NAME`")
        if named.count(p.name) > 1:
            raise ValueError(f"two parts are called `{p.name}`")
        for slot in p.slots:
            owner, _, name = slot.partition(".")
            if not is_owner(owner) or name not in {s.name for s in slots_of(owner)}:
                raise NoSlot(p.name, slot)
    _own[package.name] = package


@cache
def plugins() -> None:
    """Registers the installed plugins, once."""
    from mambadsl.parts.plugins import installed

    installed()


kinds.finders.append(plugins)
