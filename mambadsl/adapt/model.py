"""What an import of any form gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambadsl.text.diagnostic import Diagnostic

if TYPE_CHECKING:
    from mambadsl.compile import Program


@dataclass(frozen=True)
class ImportedModel:
    """program: checked. imported: the form's own record, with its `diagnostics`. origin: what it is from, in a line.
    skipped: tensors that hold nothing a model needs. files: what was written."""

    program: Program
    imported: Any
    origin: str
    skipped: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        return self.imported.diagnostics + self.program.diagnostics

    def text(self) -> str:
        """The model file, with where it is from."""
        return f"# Imported from {self.origin}\n\n{self.program.write()}"
