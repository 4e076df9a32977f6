"""Which part fills each slot of each layer: LayerGraph, part set, machine -> Assignment.

A set (or `parts` block) asked for by name is had whole, or refused: MdlError (E902) with, for each slot that nothing
fills, what could and how to get it; E907 for parts that a block names wrongly. `auto` refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.kinds.fields import Call, Mismatch
from mambadsl.kinds.fields import fill as filled
from mambadsl.kinds.kind import Dims, Slot
from mambadsl.kinds.values import Values
from mambadsl.parts import registry
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import REFERENCE, Part, Request
from mambadsl.parts.sets import SETS, PartSet
from mambadsl.spec.model import Mixer, PartChoice, PartsSpec
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError, declare
from mambadsl.text.source import Span
from mambadsl.text.spell import nearest

E902 = declare(
    "E902",
    "the part set cannot be had",
    """
    A part set says which code fills each slot of each layer. `reference` (pure torch) runs on any machine; `fused`,
    `te` and `inference` need an NVIDIA GPU and packages; `auto` takes the best that this machine has, and tells.

    A set asked for by name is never replaced in silence: for each slot that nothing fills, the message says what
    could fill it and what stands against each. `mambadsl doctor` looks at the packages of this machine and prints
    how to repair them; `mambadsl explain FILE` prints the choice for every slot.
    """,
)
E907 = declare(
    "E907",
    "a parts block names a part wrongly",
    """
    `parts NAME : BASE { mamba2.scan = mamba_ssm.scan(chunk=64) }` fills a slot with a part, called by its package and
    its name. The part must exist, fill slots of that kind, and know the arguments. `reference` is the kind's own
    function. `mambadsl explain parts` lists all parts; those of other people come from installed plugins or
    `--load FILE.py`.
    """,
)


@dataclass(frozen=True)
class Choice:
    """What fills one slot. part: a part's name, `reference`, or None: nothing, the narrower slots do the work.
    why: in words. refused: (part, reason) of those that were looked at before. covered_by: a wider slot that is
    filled, which leaves this one the work it does not do (decoding, say)."""

    slot: str
    part: str | None
    args: Values = Values()
    why: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    covered_by: str | None = None

    @property
    def text(self) -> str:
        """`te.norm_linear(fp8=true)`."""
        if self.part is None or not self.args:
            return self.part or "nothing"
        fields = registry.part(self.part).args
        given = [f"{f.name}={f.type.text(self.args[f.name])}" for f in fields if self.args[f.name] != f.default]
        return self.part + (f"({', '.join(given)})" if given else "")


@dataclass(frozen=True)
class Row:
    """One layer of the text: its label and kind, the branches that are uses of it, the choice for each slot."""

    label: str
    kind: str
    paths: tuple[str, ...]
    choices: tuple[Choice, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Assignment:
    """asked: the set's name. rows: first the model's own slots (label `model`), then layer by layer."""

    asked: str
    dtype: str
    machine: Machine
    rows: tuple[Row, ...]

    def of(self, path: str) -> Mapping[str, Choice]:
        """Slot name -> choice, of the branch at `path` (`model`: the slots around the layers)."""
        return self._by_path[path]

    @cached_property
    def _by_path(self) -> dict[str, Mapping[str, Choice]]:
        return {path: {c.slot.partition(".")[2]: c for c in row.choices} for row in self.rows for path in row.paths}

    @property
    def used(self) -> tuple[str, ...]:
        """The parts in use, each once."""
        return tuple(dict.fromkeys(c.part for row in self.rows for c in row.choices if c.part))


def assign(graph: LayerGraph, *, parts: str, machine: Machine, dtype: str = "bf16") -> Assignment:
    """The part of every slot. parts: a set, or a `parts` block of the text. dtype: "fp32", "bf16" or "fp16"."""
    blocks, base = _chain(graph, parts)
    chooser = _Chooser(parts, blocks, base, machine, dtype)
    rows = [chooser.frame(graph)]
    found: dict[tuple, list[str]] = {}
    for node in graph.nodes:
        if node.role is Role.LAYER:
            uses = node.branches()
            for path, _, mixer in uses:
                past = {"t", *graph.carried} & graph.reads[node.path] or node.gives(graph.model.d_model)
                beside = bool(past)
                key = mixer, mixer.name, node.layer.sub, node.dims(graph.model.d_model), len(uses) == 1, beside
                found.setdefault(key, []).append(path)
    for (mixer, _, sub, dims, alone, beside), paths in found.items():
        rows.append(chooser.layer(mixer, sub, dims, alone, beside, tuple(paths)))
    if chooser.problems:
        raise MdlError(chooser.problems)
    return Assignment(parts, dtype, machine, tuple(rows))


def _chain(graph: LayerGraph, name: str) -> tuple[tuple[PartsSpec, ...], PartSet]:
    """The text's blocks from `name` down, and the shipped set that they stand on."""
    own = {block.name: block for block in graph.parts}
    blocks: list[PartsSpec] = []
    while name in own:
        blocks.append(own[name])
        name = own[name].base or REFERENCE
    if name not in SETS:
        near = nearest(name, (*SETS, *own))
        help = f"did you mean `{near}`?" if near else "there are " + ", ".join((*SETS, *own))
        raise MdlError([Diagnostic(E902, f"there is no part set `{name}`", help=(help,))])
    return tuple(blocks), SETS[name]


class _Chooser:
    def __init__(self, asked: str, blocks: tuple[PartsSpec, ...], base: PartSet, machine: Machine, dtype: str):
        self.asked, self.blocks, self.base, self.machine, self.dtype = asked, blocks, base, machine, dtype
        self.problems: list[Diagnostic] = []

    def frame(self, graph: LayerGraph) -> Row:
        dims = Dims(graph.model.d_model, graph.model.d_model)
        request = Request("", graph.model, dims, None, None, True, self.dtype, self.machine)
        return Row("model", "model", ("model",), self._choices("model", "model", request, None))

    def layer(
        self, mixer: Mixer, sub: Values, dims: Dims, alone: bool, beside: bool, paths: tuple[str, ...]
    ) -> Row:
        request = Request("", mixer.fields, dims, sub, mixer.branch, alone, self.dtype, self.machine, beside=beside)
        label = mixer.name or mixer.kind
        return Row(label, mixer.kind, paths, self._choices(mixer.kind, label, request, mixer.span), mixer.span)

    def _choices(self, owner: str, label: str, request: Request, span: Span | None) -> tuple[Choice, ...]:
        slots = registry.slots_of(owner)
        wide = {name: slot.name for slot in slots for name in slot.covers}
        filled_by: dict[str, Choice] = {}
        for slot in sorted(slots, key=lambda s: not (s.covers or s.optional)):
            cover = filled_by.get(wide.get(slot.name, ""))
            covered = cover is not None and cover.part not in (None, REFERENCE)
            made = replace(request, slot=f"{owner}.{slot.name}")
            choice = self._choice(slot, label, made, span, covered=covered)
            filled_by[slot.name] = replace(choice, covered_by=wide[slot.name]) if covered else choice
        return tuple(filled_by[slot.name] for slot in slots)

    def _choice(self, slot: Slot, label: str, request: Request, span: Span | None, *, covered: bool) -> Choice:
        asked = self._asked(label, request.slot)
        owner = request.slot.partition(".")[0]
        narrow = min(filter(None, (self._asked(label, f"{owner}.{n}") for n in slot.covers)), default=None, key=_rank)
        if narrow is not None and (asked is None or _rank(narrow) < _rank(asked)):
            return Choice(request.slot, None, why=f"`{narrow[1].path}` is asked for by itself")
        if asked is not None:
            return self._by_name(asked[1], slot, label, request, span)
        refused: list[tuple[str, str]] = []
        order = self.base.order.get(request.slot, ())
        for name in order:
            if name == REFERENCE:
                break
            part = registry.part(name)
            reasons = self._obstacles(part, request) if part else ["no such part is installed"]
            if not reasons:
                args = _arguments(part, {})
                why = f"first choice of `{self.base.name}`" if not refused else f"next choice of `{self.base.name}`"
                return Choice(request.slot, name, args, why, tuple(refused))
            refused += [(name, reason) for reason in reasons]
        if slot.optional or slot.covers and REFERENCE not in order and order:
            why = "the general code does it" if request.slot.startswith("model.") else "the narrower slots do the work"
            return Choice(request.slot, None, why=why, refused=tuple(refused))
        if not order:
            return Choice(request.slot, REFERENCE, why=f"`{self.base.name}` has no other")
        if self.base.lenient or covered or REFERENCE in order:
            return Choice(request.slot, REFERENCE, why="pure torch: no part can fill it", refused=tuple(refused))
        self._cannot(label, request, refused, span)
        return Choice(request.slot, REFERENCE)

    def _asked(self, label: str, slot: str) -> tuple[tuple[int, int], PartChoice] | None:
        """The line of a parts block that says what fills the slot, and its rank, lowest first: a block before the one
        that it stands on, in a block a layer's own line before its kind's."""
        for depth, block in enumerate(self.blocks):
            lines = {choice.path: choice for choice in block.choices}
            for level, path in enumerate((f"{label}.{slot.partition('.')[2]}", slot)):
                if path in lines:
                    return (depth, level), lines[path]
        return None

    def _by_name(self, line: PartChoice, slot: Slot, label: str, request: Request, span: Span | None) -> Choice:
        why = f"`{line.path}` in the parts block" + (f", line {line.span.line}" if line.span else "")
        if line.part == REFERENCE:
            return Choice(request.slot, None if slot.optional else REFERENCE, why=why)
        part = registry.part(line.part)
        if part is None or request.slot not in part.slots:
            self._wrong(line, request.slot, known=part is not None)
            return Choice(request.slot, REFERENCE)
        try:
            args = _arguments(part, dict(line.args))
        except Mismatch as mismatch:
            self.problems.append(Diagnostic(E907, mismatch.rule, line.span, help=mismatch.help))
            return Choice(request.slot, REFERENCE)
        reasons = self._obstacles(part, replace(request, args=args))
        if reasons:
            place = Label(span, f"of this `{label}`") if span and span != line.span else None
            self._cannot(label, request, [(part.name, r) for r in reasons], line.span, named=part.name, layer=place)
        return Choice(request.slot, part.name, args, why)

    def _obstacles(self, part: Part, request: Request) -> list[str]:
        """Every reason against: of sizes and device first, then packages."""
        missing = missing_packages((part.name,), self.machine)
        return [*self._unfit(part, request), *(f"{name} {reason}" for name, reason in missing.items())]

    def _unfit(self, part: Part, request: Request) -> list[str]:
        """The reasons against that no installation takes away. A part that needs arguments fits once it has them."""
        if not request.args and part.args:
            try:
                request = replace(request, args=_arguments(part, {}))
            except Mismatch as mismatch:
                return [mismatch.rule]
        return list(part.obstacles(request))

    def _fits(self, part: Part, request: Request) -> bool:
        return not self._unfit(part, request)

    def _wrong(self, line: PartChoice, slot: str, *, known: bool) -> None:
        fitting = [p.name for p in registry.parts_for(slot)]
        what = f"`{line.part}` does not fill `{slot}`" if known else f"there is no part `{line.part}`"
        near = nearest(line.part, fitting)
        others = "parts for it: " + ", ".join((*fitting, REFERENCE))
        help = (f"did you mean `{near}`?", others) if near and not known else (others,)
        self.problems.append(Diagnostic(E907, what, line.span, help=help))

    def _cannot(
        self, label: str, request: Request, refused: list[tuple[str, str]], span: Span | None, *,
        named: str | None = None, layer: Label | None = None,
    ) -> None:
        """named: the part that a line at `span` asks for; layer: the layer that it does not fit."""
        slot = f"`{request.slot}`" if label == "model" else f"`{request.slot}` of `{label}`"
        message = f"`{named}` cannot fill {slot}" if named else f"nothing fills {slot} in the part set `{self.asked}`"
        reasons: dict[str, list[str]] = {}
        for part, reason in refused:
            reasons.setdefault(part, []).append(reason)
        notes = tuple(f"{part}: {'; '.join(every)}" for part, every in reasons.items())
        tried = [registry.part(name) for name in reasons]
        # Where sizes or the device are against a part, installing it would not help.
        lacking = missing_packages((p.name for p in tried if p and self._fits(p, request)), self.machine)
        installs = (registry.package(name).install for name in lacking if registry.package(name))
        others = (p for p in registry.parts_for(request.slot) if p not in tried and self._fits(p, request))
        could = "could fill it as well: " + ", ".join((*(p.name for p in others), REFERENCE))
        auto = "`auto` takes what this machine has; `mambadsl doctor` looks at its packages"
        help = (*dict.fromkeys(filter(None, installs)), could, auto)
        problem = Diagnostic(E902, message, span, labels=(layer,) if layer else (), notes=notes, help=help)
        if problem not in self.problems:
            self.problems.append(problem)


def missing_packages(parts: Iterable[str], machine: Machine) -> dict[str, str]:
    """Package -> why it cannot be used on the machine, of the packages that these parts come from or need."""
    found = {}
    for part in map(registry.part, parts):
        for name in (part.package, *part.needs) if part else ():
            package = registry.package(name)
            if reason := machine.missing(package) if package else "unknown: no such package of parts":
                found[name] = reason
    return found


def _rank(asked: tuple[tuple[int, int], PartChoice]) -> tuple[int, int]:
    return asked[0]


def _arguments(part: Part, given: Mapping[str, object]) -> Values:
    return filled(part.args, Call(part.name, dict(given)), owner=f"`{part.name}`")

