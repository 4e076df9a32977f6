"""File -> ModelSpec: names looked up, values typed, defaults filled in, blocks kept folded.

Raises MdlError with every problem of names and values. Layers and patterns are resolved in `layers`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from mambadsl.kinds import registry
from mambadsl.kinds.values import Values
from mambadsl.spec import codes
from mambadsl.spec.fill import E023, Given, fill, unknown
from mambadsl.spec.layers import Layers, uses
from mambadsl.spec.model import (
    MODEL_FIELDS, MTP_FIELDS, Cut, Element, ExpectSpec, ModelSpec, MtpSpec, PartChoice, PartsSpec,
)
from mambadsl.spec.scope import FileScope, Settings
from mambadsl.spec.scopes import Scopes
from mambadsl.spec.values import E042, Problem
from mambadsl.syntax import tables, tree
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError
from mambadsl.text.spell import nearest


def resolve(file: tree.File) -> ModelSpec:
    """The model that a file describes. A file without a stack is a library: its layers are checked and
    the spec has an empty stack."""
    return _Resolver(file).run()


@dataclass
class _Resolver:
    file: tree.File
    problems: dict = field(default_factory=dict)

    def run(self) -> ModelSpec:
        blocks = [s for s in self.file.statements if isinstance(s, tree.Model)]
        self._once(blocks, "model")
        self.settings = Settings(MODEL_FIELDS, self._settings(blocks[0] if blocks else None))
        scopes = Scopes(self.file, self.settings, self.report)
        main = self.settings.scope = scopes.of(self.file)
        model, origins = self._model()
        self.layers = Layers(scopes, model, self.report)
        for let in main.lets.values():
            self.layers.value(tree.Term(let.name, span=let.name.span), main)
        for name in main.layers:
            self.layers.layer(main, name)
        pattern, mtp = self._stack(main)
        parts = self._parts(main)
        expects = tuple(ExpectSpec(s, main) for s in self.file.statements if isinstance(s, tree.Expect))
        if self.problems:
            raise MdlError(self.problems.values())
        name = blocks[0].name.text if blocks else name_of(self.file.source.name)
        return ModelSpec(name, model, pattern, mtp, parts, expects, origins, self.file)

    def report(self, diagnostic: Diagnostic) -> None:
        span = diagnostic.span
        key = (diagnostic.code.id, span.source.name, span.start, span.end) if span else diagnostic
        self.problems.setdefault(key, diagnostic)

    # -- statements

    def _once(self, found: list, what: str) -> None:
        for again in found[1:]:
            first = Label(found[0].span, "the first one")
            self.report(Diagnostic(codes.E026, f"a file has one `{what}`", again.span, "another one", (first,)))

    def _settings(self, block: tree.Model | None) -> dict[str, tree.Setting]:
        legal = [f.name for f in MODEL_FIELDS]
        found: dict[str, tree.Setting] = {}
        for setting in block.settings if block else ():
            key = setting.name
            if key.text not in legal:
                self.report(unknown(E023, key, "the model", legal))
            elif key.text in found:
                first = Label(found[key.text].name.span, "first here")
                self.report(Diagnostic(E042, f"`{key.text}` is given twice", key.span, labels=(first,)))
            else:
                found[key.text] = setting
        return found

    def _model(self) -> tuple[Values, dict]:
        given = {}
        for name, setting in self.settings.given.items():
            try:
                given[name] = Given(self.settings.written(name), setting.name.span, setting.value.span)
            except Problem as problem:
                self.report(problem.diagnostic)
        names = self.settings.scope.names()
        values, origins, _ = fill(MODEL_FIELDS, given, model=None, report=self.report, names=names)
        return values, origins

    def _stack(self, main: FileScope) -> tuple[tuple[Element, ...], MtpSpec | None]:
        stacks = [s for s in self.file.statements if isinstance(s, tree.Stack)]
        tails = [s for s in self.file.statements if isinstance(s, tree.Mtp)]
        self._once(stacks, "stack")
        self._once(tails, "mtp")
        pattern = self.file.pattern or (stacks[0].pattern if stacks else None)
        items = self.layers.pattern(pattern, main) if pattern else ()
        mtp = None
        if tails:
            tail = tails[0]
            given = self.layers.arguments(tail.args, main, "`mtp`", [f.name for f in MTP_FIELDS])
            settings, _, _ = fill(MTP_FIELDS, given, model=None, report=self.report, names=main.names())
            mtp = MtpSpec(settings, self.layers.pattern(tail.pattern, main), tail.span)
            for cut in (e for e in mtp.items if isinstance(e, Cut)):
                self.report(Diagnostic(codes.E049, "the `mtp` tail is in the last stage; no `|` in it", cut.span))
        return items, mtp

    def _parts(self, main: FileScope) -> tuple[PartsSpec, ...]:
        from mambadsl.parts.sets import SETS

        blocks = [s for s in self.file.statements if isinstance(s, tree.Parts)]
        known = [*SETS, *(b.name.text for b in blocks)]
        found: dict[str, PartsSpec] = {}
        for block in blocks:
            if block.name.text in found:
                self.report(Diagnostic(codes.E026, f"parts `{block.name.text}` stand twice", block.name.span))
            if block.base and block.base.text not in known:
                near = nearest(block.base.text, known)
                help = (f"did you mean `{near}`?",) if near else ("sets: " + ", ".join(known),)
                self.report(Diagnostic(codes.E028, f"there is no part set `{block.base.text}`", block.base.span, help=help))
            choices = []
            for slot in block.slots:
                self._slot(slot.path, main)
                args = self.layers.arguments(slot.args or (), main, f"`{slot.part.text}`", None)
                plain = tuple((k, g.value) for k, g in args.items())
                choices.append(PartChoice(slot.path.text, slot.part.text, plain, slot.span))
            base = block.base.text if block.base else None
            found[block.name.text] = PartsSpec(block.name.text, base, tuple(choices), block.span)
        return tuple(found.values())

    def _slot(self, path: tree.Name, main: FileScope) -> None:
        """`mamba2.scan` or `W.core`: the owner and the slot must exist."""
        owner, _, slot = path.text.partition(".")
        if owner[0].isupper():
            element = self.layers.layer(main, owner, at=path.span)
            kinds = {m.kind for use in uses(element) for m in use.layer.branches} if element else set()
        elif owner in registry.names():
            kinds = {owner}
        else:
            near = nearest(owner, registry.names())
            help = (f"did you mean `{near}`?",) if near else ("kinds: " + ", ".join(registry.names()),)
            self.report(Diagnostic(codes.E021, f"there is no kind `{owner}`", path.span, help=help))
            return
        slots = sorted({s.name for kind in kinds for s in registry.get(kind).slots})
        if kinds and slot not in slots:
            near = nearest(slot, slots)
            help = (f"did you mean `{owner}.{near}`?",) if near else (f"slots of {owner}: " + ", ".join(slots),)
            self.report(Diagnostic(codes.E028, f"`{owner}` has no slot `{slot}`", path.span, help=help))


def name_of(source: str) -> str:
    """A model's name from its file's: `Tiny-2.mdl` -> tiny_2; a legal name, whatever the file is called."""
    stem = re.sub(r"[^a-z0-9]+", "_", Path(source).stem.lower()).strip("_")
    if not stem or stem[0].isdigit() or stem in tables.load().keywords:
        stem = f"model_{stem}".rstrip("_")
    return stem if stem != "model" else "a_model"
