"""Where the project's own files lie: the grammar and the shipped models.

Out: `GRAMMARS` and `MODELS`. In an installed wheel both are inside the package; in a checkout they are
beside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _folder(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


GRAMMARS = _folder("grammars")
MODELS = _folder("models")
