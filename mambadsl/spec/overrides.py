"""`--set NAME=VALUE`: one form of change from outside, made on the tree before anything is resolved.

NAME is a model setting (`d_model`), a constant (`let`) of the main file, or `Layer.field` (`M.heads`). The
places of such values are in sources of their own, whose names start with `--set`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NoReturn

from mambadsl.spec.exact import text_of
from mambadsl.spec.files import Files
from mambadsl.spec.model import MODEL_FIELDS, name_of
from mambadsl.spec.scope import raw
from mambadsl.syntax import tree
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError, declare
from mambadsl.text.source import Source, Span, from_text
from mambadsl.text.spell import nearest

E048 = declare(
    "E048",
    "`--set` of something that cannot be set",
    """
    `--set NAME=VALUE` changes a model setting (`--set d_model=1024`), a constant of the file
    (`--set expert=512`), or a field of one of its layers (`--set M.heads=16`). The value is written as in
    the file. `expect` lines speak of the model as written and are not checked then.
    """,
)
_SETTINGS = tuple(f.name for f in MODEL_FIELDS)


def override(file: tree.File, sets: Mapping[str, Any]) -> tree.File:
    """The file with those values instead of its own: text of the language, or numbers, bools, None, lists.
    Raises MdlError, at the text of the option."""
    problems: list[Diagnostic] = []
    for name, text in sets.items():
        try:
            file = _Option(name, text if isinstance(text, str) else text_of(raw(text))).into(file)
        except MdlError as error:
            problems += error.diagnostics
    if problems:
        raise MdlError(problems)
    return file


def is_outside(span: Span) -> bool:
    """Whether the place is an option's text."""
    return span.source.name.startswith("--set")


def from_outside(file: tree.File) -> bool:
    """Whether any value of the file was set from outside."""
    return any(is_outside(span) for s in file.statements for span in _value_spans(s))


def _value_spans(statement: tree.Statement) -> Iterable[Span]:
    match statement:
        case tree.Let(value=value):
            return (value.span,)
        case tree.Model(settings=settings):
            return (setting.value.span for setting in settings)
        case tree.Layer(item=tree.Term(args=args) | tree.Use(args=args)):
            return (arg.value.span for arg in args or ())
    return ()


class _Option:
    """One `--set`: its text is a source, the value and its name are places there."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.source = from_text(f"--set {name}={text}", name=f"--set {name}")
        self.whole = Span(self.source, 0, len(self.source.text))
        place = Span(self.source, len("--set "), len(f"--set {name}"))
        self.key = tree.Name(name.rpartition(".")[2], span=place)
        self.value = self._read(text)

    def into(self, file: tree.File) -> tree.File:
        if "." in self.name:
            return self._layer(file)
        lets = [s for s in file.statements if isinstance(s, tree.Let)]
        if any(let.name.text == self.name for let in lets):
            return replace(file, statements=tuple(self._let(s) for s in file.statements))
        if self.name in _SETTINGS:
            return self._setting(file)
        legal = [*_SETTINGS, *(let.name.text for let in lets)]
        self._refuse(f"there is no setting or constant `{self.name}`", legal)

    def _let(self, statement: tree.Statement) -> tree.Statement:
        if isinstance(statement, tree.Let) and statement.name.text == self.name:
            return replace(statement, value=self.value)
        return statement

    def _setting(self, file: tree.File) -> tree.File:
        setting = tree.Setting(self.key, self.value, span=self.whole)
        statements = list(file.statements)
        for i, s in enumerate(statements):
            if isinstance(s, tree.Model):
                kept = tuple(t for t in s.settings if t.name.text != self.name)
                statements[i] = replace(s, settings=(*kept, setting))
                return replace(file, statements=tuple(statements))
        model = tree.Model(tree.Name(name_of(file.source.name), span=self.whole), (setting,), span=self.whole)
        return replace(file, statements=(model, *self._statements(file)), pattern=None)

    def _layer(self, file: tree.File) -> tree.File:
        owner, _, field = self.name.partition(".")
        if "." in field:
            self._refuse(f"`{field}` is no field: only a whole field can be set", ())
        layers = [s.name.text for s in file.statements if isinstance(s, tree.Layer)]
        if owner not in layers:
            return self._prelude_layer(file, owner, layers)
        return replace(file, statements=tuple(
            replace(s, item=self._changed(s)) if isinstance(s, tree.Layer) and s.name.text == owner else s
            for s in file.statements
        ))

    def _prelude_layer(self, file: tree.File, owner: str, layers: list[str]) -> tree.File:
        """The file with a layer of the prelude of its own, changed."""
        usual = {s.name.text: s for s in Files(file).std().statements if isinstance(s, tree.Layer)}
        if owner not in usual:
            self._refuse(f"neither the file nor std.mdl declares a layer `{owner}`", [*layers, *usual], word=owner)
        mine = replace(usual[owner], item=self._changed(usual[owner]))
        return replace(file, statements=(*self._statements(file), mine), pattern=None)

    @staticmethod
    def _statements(file: tree.File) -> tuple[tree.Statement, ...]:
        """A bare pattern as a file's statements."""
        if file.pattern is None:
            return file.statements
        return (tree.Stack(file.pattern, span=file.pattern.span),)

    def _changed(self, layer: tree.Layer) -> tree.Item:
        item = layer.item
        if not isinstance(item, (tree.Use, tree.Term)):
            what = "a sum" if isinstance(item, tree.Parallel) else "a block"
            declared = (Label(layer.name.span, f"{what}, declared here"),)
            message = f"only a single layer has fields to set; `{layer.name.text}` is {what}"
            raise MdlError([Diagnostic(E048, message, self.key.span, labels=declared)])
        kept = tuple(a for a in item.args or () if a.name is None or a.name.text != self.key.text)
        return replace(item, args=(*kept, tree.Arg(self.key, self.value, span=self.whole)))

    def _read(self, text: str) -> tree.Value:
        """The value, with places in the option's text."""
        before = "let x = "
        shift = len(f"--set {self.name}=") - len(before)
        try:
            first, *more = read(from_text(before + text, name="--set")).statements
        except MdlError as error:
            raise MdlError(_moved(d, self.source, shift) for d in error.diagnostics) from None
        if more:
            rest = _moved(more[0].span.to(more[-1].span), self.source, shift)
            raise MdlError([Diagnostic(E048, "an option takes one value", rest, "more than a value")])
        return _moved(first.value, self.source, shift)

    def _refuse(self, message: str, legal: Iterable[str], *, word: str | None = None) -> NoReturn:
        legal = list(legal)
        near = nearest(word or self.name, legal)
        listed = ", ".join(legal[:20]) + (", ..." if len(legal) > 20 else "")
        if near or legal:
            help = (f"did you mean `{near}`?" if near else f"there are {listed}",)
        else:
            help = (f"declare it in the file: `layer {word} = ...`",) if word else ()
        raise MdlError([Diagnostic(E048, message, self.key.span, help=help)])


def _moved(value: Any, source: Source, shift: int) -> Any:
    """A tree or a diagnostic with places in another source, `shift` characters further on."""
    if isinstance(value, Span):
        places = (min(max(at + shift, 0), len(source.text)) for at in (value.start, value.end))
        return Span(source, *places)
    if isinstance(value, tuple):
        return tuple(_moved(v, source, shift) for v in value)
    if isinstance(value, (tree.Node, Diagnostic, Label)):
        parts = {f.name: _moved(getattr(value, f.name), source, shift) for f in fields(value)}
        return replace(value, **parts)
    return value
