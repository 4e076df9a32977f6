"""The scopes of all files of one model: each file's own names, and what it imports."""

from __future__ import annotations

from collections.abc import Callable

from mambadsl.spec import codes
from mambadsl.spec.files import E032, Files
from mambadsl.spec.scope import FileScope, Imported, Settings
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.spell import nearest


class Scopes:
    """Reads imported files when a scope is first asked for; what is wrong goes to `report`."""

    def __init__(self, main: tree.File, settings: Settings, report: Callable[[Diagnostic], None]):
        self.files, self.settings, self.report = Files(main), settings, report
        self._scopes: dict[int, FileScope] = {}
        self._std: FileScope | None = None

    def std(self) -> FileScope:
        """The prelude's scope."""
        if self._std is None:
            self._std = self.of(self.files.std())
        return self._std

    def of(self, file: tree.File) -> FileScope:
        key = id(file)
        if key not in self._scopes:
            problems: list[Diagnostic] = []
            scope = self._scopes[key] = FileScope(file, self.settings, problems)
            for problem in problems:
                self.report(problem)
            for statement in file.statements:
                if isinstance(statement, tree.Import):
                    self._import(statement, scope)
        return self._scopes[key]

    def _import(self, statement: tree.Import, into: FileScope) -> None:
        try:
            there = self.files.follow(statement, into.file)
            loops = id(there) in self._scopes and self._imports_back(there, into.file)
            if loops:
                raise MdlError([Diagnostic(E032, "imports run in a circle", statement.path.span)])
        except MdlError as error:
            for diagnostic in error.diagnostics:
                self.report(diagnostic)
            return
        scope = self.of(there)
        declared = {*scope.lets, *scope.layers, *scope.imports}
        for name in statement.names:
            if name.text not in declared:
                near = nearest(name.text, declared)
                help = (f"did you mean `{near}`?",) if near else ("it declares " + ", ".join(sorted(declared)),)
                message = f"`{statement.path.value}` declares no `{name.text}`"
                self.report(Diagnostic(codes.E027, message, name.span, "not there", help=help))
            else:
                into.imports[name.text] = Imported(scope, name)

    def _imports_back(self, start: tree.File, target: tree.File) -> bool:
        """Whether `start` imports `target`, directly or through others read so far."""
        seen, todo = set(), [start]
        while todo:
            file = todo.pop()
            if file is target:
                return True
            if id(file) in seen:
                continue
            seen.add(id(file))
            for statement in file.statements:
                if isinstance(statement, tree.Import):
                    try:
                        todo.append(self.files.follow(statement, file))
                    except MdlError:
                        continue
        return False
