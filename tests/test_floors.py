"""The layout is a rule: imports go down only, torch stays where modules are made."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mambadsl"
FLOORS = {
    "text": 0, "files": 0, "syntax": 1, "kinds": 1, "parts": 1.5, "spec": 2, "graph": 3, "plan": 4, "build": 5,
    "show": 5, "adapt": 5.5, "data": 5.5, "run": 6, "train": 6, "hf": 6, "megatron": 6, "cli": 7,
}
#: The compiler's front: names every stage, imports each when it is reached.
FRONT = {"compile", "__init__", "__main__"}
TORCH = {"build", "run", "train"}
#: What the compiler reads of a kind: everything else below kinds/ may be torch.
TABLES = {"kind.py", "fields.py", "values.py", "registry.py", "sublayer.py", "__init__.py"}
#: What is known of a part before any of it is loaded.
PARTS_TABLES = {"package.py", "accepts.py"}
#: Where tensors of others are read, written and compared; their settings need none of it.
ADAPT_TORCH = {"files.py", "tensors.py", "weights.py", "verify.py", "checkpoint.py"}
#: Where rows become tensors; files are read and packed without torch.
DATA_TORCH = {"rows.py"}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def _floor(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether only type checkers see it)."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner) for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.module, id(node) in hidden)]
            found += [(f"{node.module}.{a.name}", id(node) in hidden) for a in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name, id(node) in hidden) for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    mine = _floor(path)
    if mine in FRONT:
        return
    for module, hidden in _imports(path):
        names = module.split(".")
        if names[0] != "mambadsl" or len(names) < 2 or hidden:
            continue
        other = names[1]
        if other == mine or other not in FLOORS:
            continue
        assert FLOORS[other] < FLOORS[mine], f"{path.name} ({mine}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_only_where_modules_are_made(path):
    if _floor(path) in TORCH:
        return
    if _floor(path) == "kinds" and path.name not in TABLES:
        return
    if _floor(path) == "parts" and path.parent.name != "parts" and path.name not in PARTS_TABLES:
        return
    if _floor(path) in ("adapt", "hf", "megatron") and path.name in ADAPT_TORCH:
        return
    if _floor(path) == "data" and path.name in DATA_TORCH:
        return
    assert not any(m == "torch" or m.startswith("torch.") for m, hidden in _imports(path) if not hidden)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_second_list_of_kinds(path):
    """`== "mamba2"` outside the kinds' folders means that a table is missing (checks name the kind they rule)."""
    if _floor(path) == "kinds" or "checks" in path.parts:
        return
    from mambadsl.kinds.registry import names

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            for side in [node.left, *node.comparators]:
                assert not (isinstance(side, ast.Constant) and side.value in names()), f"{path}:{node.lineno}"


def test_checking_and_planning_load_no_torch():
    code = (
        "import sys, mambadsl\n"
        "p = mambadsl.load(text='M M A F'); p.plan(stages=2, device='h200'); p.expand(); p.write()\n"
        "heavy = {'torch', 'numpy', 'networkx', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_front_imports_next_to_nothing():
    code = (
        "import sys, mambadsl\n"
        "assert {'TrainStep', 'Decoder', 'load'} <= set(dir(mambadsl))\n"
        "mine = {name for name in sys.modules if name.startswith('mambadsl')}\n"
        "assert mine == {'mambadsl'}, mine\n"
        "heavy = {'torch', 'numpy', 'triton', 'networkx', 'lark', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_stay_readable():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
