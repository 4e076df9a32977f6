"""File -> ModelSpec: names looked up, values typed, defaults filled in, blocks kept folded.

Raises MdlError with every problem of names and values. Layers and patterns are resolved in `layers`, parts
blocks in `parts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mambadsl.kinds.values import Values
from mambadsl.spec import codes
from mambadsl.spec.fill import E023, Given, fill, unknown
from mambadsl.spec.layers import Layers
from mambadsl.spec.model import (
    MODEL_FIELDS,
    MTP_FIELDS,
    Element,
    ExpectSpec,
    ModelSpec,
    MtpSpec,
    Origin,
    first_cut,
    name_of,
)
from mambadsl.spec.overrides import from_outside
from mambadsl.spec.parts import resolve_parts
from mambadsl.spec.recipes import FAILED
from mambadsl.spec.scope import Constants, FileScope
from mambadsl.spec.scopes import Scopes
from mambadsl.spec.values import E042, Problem
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError

#: No more problems than this are looked for, so that looking takes no time.
MAX_REPORTED = 50


def resolve(file: tree.File) -> ModelSpec:
    """The model that a file describes. A file without a stack is a library: its layers are checked and
    the spec has an empty stack. With values from outside (`--set`), `expect` lines are left out."""
    resolver = _Resolver(file)
    try:
        spec = resolver.run()
    except _Enough:
        spec = None
    if problems := resolver.problems.values():
        raise MdlError(map(resolver.scopes.located, problems) if resolver.scopes else problems)
    return spec


class _Enough(Exception):
    """There are MAX_REPORTED problems."""


@dataclass
class _Resolver:
    file: tree.File
    problems: dict[tuple, Diagnostic] = field(default_factory=dict)
    scopes: Scopes | None = None

    def run(self) -> ModelSpec:
        file = self.file
        blocks = [s for s in file.statements if isinstance(s, tree.Model)]
        self._once(blocks, "model")
        constants = Constants(MODEL_FIELDS, self._settings(blocks[0] if blocks else None))
        self.scopes = Scopes(file, constants, self.report)
        main = constants.main = self.scopes.of(file)
        model, origins = self._model(constants)
        layers = Layers(self.scopes, model, self.report)
        for let in main.lets.values():
            layers.value(tree.Term(let.name, span=let.name.span), main)
        for layer in main.layers.values():
            layers.layer(main, layer.name)
        stack, mtp = self._stack(main, layers)
        laid_out = (*stack, *(mtp.items if mtp else ()))
        parts = resolve_parts(file, main, layers, self.report, model=laid_out)
        facts = [s for s in file.statements if isinstance(s, tree.Expect)]
        expects = () if from_outside(file) else tuple(ExpectSpec(s, main) for s in facts)
        name = blocks[0].name.text if blocks else name_of(file.source.name)
        return ModelSpec(name, model, stack, mtp, parts, expects, origins, file)

    def report(self, diagnostic: Diagnostic) -> None:
        span = diagnostic.span
        key = (diagnostic.code, diagnostic.message, span)
        self.problems.setdefault(key, diagnostic)
        if len(self.problems) >= MAX_REPORTED:
            raise _Enough

    # -- statements

    def _once(self, found: list, what: str) -> None:
        for again in found[1:]:
            labels = (Label(found[0].span, "the first one"),)
            self.report(Diagnostic(codes.E026, f"a file has one `{what}`", again.span, "another one", labels))

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

    def _model(self, constants: Constants) -> tuple[Values, dict[str, Origin]]:
        given = {}
        for name, setting in constants.given.items():
            try:
                value = constants.written(name)
                given[name] = Given(value, setting.name.span, setting.value.span, constants.main)
            except Problem as problem:
                self.report(problem.diagnostic)
        values, origins, _ = fill(MODEL_FIELDS, given, model=None, report=self.report)
        return values, origins

    def _stack(self, main: FileScope, layers: Layers) -> tuple[tuple[Element, ...], MtpSpec | None]:
        stacks = [s for s in self.file.statements if isinstance(s, tree.Stack)]
        tails = [s for s in self.file.statements if isinstance(s, tree.Mtp)]
        self._once(stacks, "stack")
        self._once(tails, "mtp")
        pattern = self.file.pattern or (stacks[0].pattern if stacks else None)
        items = layers.pattern(pattern, main) if pattern else ()
        return items, self._mtp(tails[0], main, layers) if tails else None

    def _mtp(self, tail: tree.Mtp, main: FileScope, layers: Layers) -> MtpSpec:
        given = layers.arguments(tail.args, main, "`mtp`", [f.name for f in MTP_FIELDS])
        given = {name: g for name, g in given.items() if g.value is not FAILED}
        settings, _, _ = fill(MTP_FIELDS, given, model=None, report=self.report)
        items = layers.pattern(tail.pattern, main)
        if cut := first_cut(items):
            self.report(Diagnostic(codes.E049, "the `mtp` tail is in the last stage; no `|` in it", cut.span))
        return MtpSpec(settings, items, tail.span)
