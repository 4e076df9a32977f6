"""The long story of a diagnostic code, for `mambadsl explain E204`.

In: a code as people write it. Out: its text (Markdown), or None, with `similar` codes to offer. Which codes
there are is read from the files' text; only the file that declares the asked one is imported.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from mambadsl.text.diagnostic import CODES, FAMILIES, Code
from mambadsl.text.spell import edits

_DECLARED = re.compile(r"^([EWI]\d{3}) = declare\(", re.MULTILINE)


def story(code_id: str) -> str | None:
    """Title, severity, family and story of a code; None for an unknown one."""
    home = homes().get(_plain(code_id))
    if home is None:
        return None
    import_module(home)
    code = CODES[_plain(code_id)]
    return f"# {code.id}: {code.title}\n\n{code.severity}; {FAMILIES[code.id[1]]}\n\n{code.story}\n"


def similar(code_id: str, *, most: int = 3) -> tuple[str, ...]:
    """Codes to offer for an unknown one: the same number first, then those that differ least."""
    wanted = _plain(code_id)
    near = sorted((edits(wanted[1:], id[1:]), id[1:2] != wanted[1:2], id) for id in homes())
    return tuple(id for distance, _, id in near[:most] if distance < 3)


@cache
def homes() -> dict[str, str]:
    """The module that declares each code, by id, in order of number."""
    root = Path(__file__).parent.parent
    found = {}
    for path in root.rglob("*.py"):
        module = ".".join(("mambadsl", *path.relative_to(root).with_suffix("").parts))
        for id in _DECLARED.findall(path.read_text(encoding="utf-8")):
            found[id] = module.removesuffix(".__init__")
    return dict(sorted(found.items(), key=lambda item: (item[0][1:], item[0][0])))


def all_codes() -> dict[str, Code]:
    """Every code of the project. Imports all files that declare one (some of them torch)."""
    for module in set(homes().values()):
        import_module(module)
    return {id: CODES[id] for id in homes()}


def _plain(code_id: str) -> str:
    return code_id.strip().strip("[]").upper()
