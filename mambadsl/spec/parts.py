"""Parts blocks: which code fills each slot. Resolved here (the slots must exist; the parts are looked up
when the model is built), and written back as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mambadsl.kinds.fields import Call
from mambadsl.parts.registry import is_owner, slots_of
from mambadsl.parts.sets import SETS
from mambadsl.spec import codes
from mambadsl.spec.exact import text_of
from mambadsl.spec.layers import Layers, layers_of, no_kind
from mambadsl.spec.model import Element, PartChoice, PartsSpec
from mambadsl.spec.order import Circle, circle, in_order
from mambadsl.spec.recipes import FAILED
from mambadsl.spec.scope import E025, FileScope
from mambadsl.spec.values import E042
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label
from mambadsl.text.spell import nearest

Report = Callable[[Diagnostic], None]


def resolve_parts(
    file: tree.File, main: FileScope, layers: Layers, report: Report, *, model: tuple[Element, ...]
) -> tuple[PartsSpec, ...]:
    """The parts blocks of a file. model: everything that is laid out (nothing in a library)."""
    blocks = {}
    for block in (s for s in file.statements if isinstance(s, tree.Parts)):
        name = block.name.text
        if name in SETS:
            message = f"`{name}` is a part set already"
            help = (f"give the block a name of its own: `parts my_{name} : {name} {{ ... }}`",)
            report(Diagnostic(codes.E026, message, block.name.span, help=help))
        elif name in blocks:
            first = Label(blocks[name].name.span, "the first one")
            report(Diagnostic(codes.E026, f"parts `{name}` stand twice", block.name.span, labels=(first,)))
        else:
            blocks[name] = block
    _bases(blocks, report)
    names = {mixer.name for element in model for use in layers_of(element) for mixer in use.layer.branches}
    return tuple(_block(block, main, layers, report, names) for block in blocks.values())


def _bases(blocks: dict[str, tree.Parts], report: Report) -> None:
    known = [*SETS, *blocks]
    for block in blocks.values():
        if block.base and block.base.text not in known:
            near = nearest(block.base.text, known)
            help = f"did you mean `{near}`?" if near else "sets: " + ", ".join(known)
            message = f"there is no part set `{block.base.text}`"
            report(Diagnostic(codes.E028, message, block.base.span, help=(help,)))

    def needs(name: str) -> Iterable[str]:
        base = blocks[name].base
        return (base.text,) if base and base.text in blocks else ()

    done: set[str] = set()
    for name in blocks:
        while name not in done:
            try:
                done.update(in_order(name, needs=needs, done=done.__contains__))
            except Circle as found:
                done.update(found.keys)
                report(circle(E025, [blocks[key].name for key in found.keys], built="based on"))


def _block(block: tree.Parts, main: FileScope, layers: Layers, report: Report, used: set) -> PartsSpec:
    choices: dict[str, PartChoice] = {}
    for slot in block.slots:
        path = slot.path.text
        _slot(slot.path, main, layers, report, used)
        given = layers.arguments(slot.args or (), main, f"`{slot.part.text}`", None)
        args = tuple((key, _bare(g.value)) for key, g in given.items() if g.value is not FAILED)
        if path in choices:
            first = Label(choices[path].span, "first here")
            report(Diagnostic(E042, f"`{path}` is given twice", slot.path.span, labels=(first,)))
        choices.setdefault(path, PartChoice(path, slot.part.text, args, slot.span))
    base = block.base.text if block.base else None
    return PartsSpec(block.name.text, base, tuple(choices.values()), block.span)


def _slot(path: tree.Name, main: FileScope, layers: Layers, report: Report, used: set) -> None:
    """`mamba2.scan` or `W.core`: the owner and the slot must exist, and a layer be used in the model."""
    owner, dot, slot = path.text.partition(".")
    place = replace(path.span, end=path.span.start + len(owner))
    if not dot:
        help = ("for instance `mamba2.scan`, or of one layer, `W.scan`",)
        report(Diagnostic(codes.E028, f"`{owner}` names no slot: write KIND.SLOT", path.span, help=help))
        return
    if owner[0].isupper():
        element = layers.layer(main, tree.Name(owner, span=place))
        if element is None:
            return
        mixers = [mixer for use in layers_of(element) for mixer in use.layer.branches]
        if len(mixers) != 1:
            help = ("name the layers in it, or the kind: `mamba2.scan`",)
            report(Diagnostic(codes.E028, f"`{owner}` is not a single layer", place, help=help))
            return
        if used and owner not in used:
            help = ("use it in the stack, or take the line out",)
            report(Diagnostic(codes.E028, f"no layer of the model is a `{owner}`", place, help=help))
            return
        kinds = {mixers[0].kind}
    elif is_owner(owner):
        kinds = {owner}
    else:
        report(no_kind(owner, place))
        return
    slots = sorted({s.name for kind in kinds for s in slots_of(kind)})
    if slot not in slots:
        near = nearest(slot, slots)
        help = f"did you mean `{owner}.{near}`?" if near else f"slots of {owner}: " + ", ".join(slots)
        report(Diagnostic(codes.E028, f"`{owner}` has no slot `{slot}`", path.span, help=(help,)))


def _bare(value: Any) -> Any:
    """A raw value that compares and hashes by what it is."""
    if isinstance(value, list):
        return tuple(map(_bare, value))
    if isinstance(value, Call):
        return Call(value.name, {key: _bare(v) for key, v in value.args.items()})
    return value


def parts_text(block: PartsSpec) -> str:
    """The block in the language."""
    base = f" : {block.base}" if block.base else ""
    lines = [f"parts {block.name}{base} {{"]
    for choice in block.choices:
        args = ", ".join(f"{k}={text_of(v)}" for k, v in choice.args)
        lines.append(f"  {choice.path} = {choice.part}" + (f"({args})" if choice.args else ""))
    return "\n".join([*lines, "}"])
