"""The long story of a diagnostic code, for `mambadsl explain E204`.

In: a code as people write it. Out: its text (Markdown), or None with `similar` codes to offer. Every file of
the compiler that declares codes is imported once; none of those may load torch.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from mambadsl.text.diagnostic import CODES, FAMILIES, Code
from mambadsl.text.spell import edits

#: Packages whose files may declare codes.
PACKAGES = ("text", "syntax", "kinds", "parts", "spec", "graph", "plan", "build", "adapt")


def story(code_id: str) -> str | None:
    """Title, severity, family and story of a code; None for an unknown one."""
    code = all_codes().get(code_id.strip().strip("[]").upper())
    if code is None:
        return None
    return f"# {code.id}: {code.title}\n\n{code.severity}; {FAMILIES[code.id[1]]}\n\n{code.story}\n"


def similar(code_id: str, *, most: int = 3) -> tuple[str, ...]:
    """Codes to offer for an unknown one: the same number first, then those that differ least."""
    wanted = code_id.strip().strip("[]").upper()
    near = sorted((edits(wanted[1:], id[1:]), id[1:2] != wanted[1:2], id) for id in all_codes())
    return tuple(id for distance, _, id in near[:most] if distance < 3)


@cache
def all_codes() -> dict[str, Code]:
    """Every code of the project by its id, in order of number."""
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if re.search(r"^[EWI]\d{3} = declare\($", path.read_text(encoding="utf-8"), re.MULTILINE):
                import_module("mambadsl." + ".".join(path.relative_to(root).with_suffix("").parts))
    return dict(sorted(CODES.items(), key=lambda item: (item[0][1:], item[0][0])))
