"""The scopes of all files of one model: each file's own names, and what it imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mambadsl.spec import codes
from mambadsl.spec.files import E032, Files
from mambadsl.spec.scope import Constants, FileScope, Imported
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError
from mambadsl.text.source import Source, Span
from mambadsl.text.spell import nearest


class Scopes:
    """Reads imported files when a scope is first asked for; what is wrong goes to `report`."""

    def __init__(self, main: tree.File, constants: Constants, report: Callable[[Diagnostic], None]):
        self.files, self.constants, self.report = Files(main), constants, report
        self._scopes: dict[int, FileScope] = {}
        self._std: FileScope | None = None
        self._open: list[tuple[tree.File, tree.Import | None]] = [(main, None)]
        #: How each other file came into the model.
        self._entrances: dict[Source, Label] = {}

    def std(self, at: Span | None = None) -> FileScope:
        """The prelude's scope. at: the use that asks for it."""
        if self._std is None:
            self._std = self.of(self.files.std())
        if at is not None:
            self._entrances.setdefault(self._std.file.source, Label(at, "used here"))
        return self._std

    def of(self, file: tree.File) -> FileScope:
        key = id(file)
        if key not in self._scopes:
            scope = self._scopes[key] = FileScope(file, self.constants, self.report)
            for statement in file.statements:
                if isinstance(statement, tree.Import):
                    self._import(statement, scope)
        return self._scopes[key]

    def located(self, diagnostic: Diagnostic) -> Diagnostic:
        """A problem in an imported file with the imports that led there."""
        if diagnostic.span is None:
            return diagnostic
        labels, source = list(diagnostic.labels), diagnostic.span.source
        while entrance := self._entrances.get(source):
            if all(label.span != entrance.span for label in labels):
                labels.append(entrance)
            source = entrance.span.source
        return replace(diagnostic, labels=tuple(labels))

    def _import(self, statement: tree.Import, into: FileScope) -> None:
        try:
            there = self.files.follow(statement, into.file)
            self._circle(there, statement)
        except MdlError as error:
            here = Label(statement.path.span, "imported here")
            for diagnostic in error.diagnostics:
                if diagnostic.span is None:
                    diagnostic = replace(diagnostic, span=here.span)
                elif diagnostic.span.source is not into.file.source:
                    self._entrances.setdefault(diagnostic.span.source, here)
                self.report(diagnostic)
                for name in statement.names:
                    into.broken.setdefault(name.text, diagnostic)
            return
        self._entrances.setdefault(there.source, Label(statement.path.span, "imported here"))
        self._open.append((there, statement))
        scope = self.of(there)
        self._open.pop()
        for name in statement.names:
            if name.text in into.layers or name.text in into.lets:
                continue  # declared twice, which was reported
            if name.text in scope.declared():
                into.imports.setdefault(name.text, Imported(scope, name))
            elif name.text in scope.broken:
                into.broken.setdefault(name.text, scope.broken[name.text])
            else:
                into.broken.setdefault(name.text, self._missing(name, statement, scope))
                self.report(into.broken[name.text])

    def _circle(self, there: tree.File, statement: tree.Import) -> None:
        """Raises MdlError where `there` is being imported already."""
        files = [file for file, _ in self._open]
        at = next((i for i, file in enumerate(files) if file is there), None)
        if at is not None:
            labels = tuple(Label(s.path.span, "on the way here") for _, s in self._open[at + 1 :])
            raise MdlError([
                Diagnostic(E032, "imports run in a circle", statement.path.span, "back to the start", labels)
            ])

    def _missing(self, name: tree.Name, statement: tree.Import, scope: FileScope) -> Diagnostic:
        declared = scope.declared()
        near = nearest(name.text, declared)
        listed = ", ".join(declared[:20]) + (", ..." if len(declared) > 20 else "")
        help = f"did you mean `{near}`?" if near else f"it declares {listed or 'nothing'}"
        message = f"`{statement.path.value}` declares no `{name.text}`"
        return Diagnostic(codes.E027, message, name.span, "not there", help=(help,))
