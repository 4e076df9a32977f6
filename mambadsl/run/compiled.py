"""What `mambadsl compile` writes, and its way back: a folder with graph.json, plan.json, summary.txt.

Same input, same bytes. `load_compiled(folder)` needs no `.mdl` any more: it reads the graph (refusing a
changed one by its hash), checks it again, and builds the model or any stage of the plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambadsl.graph import json as graph_json
from mambadsl.graph.checks import CheckedGraph, check
from mambadsl.plan.plan import Plan
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

#: A model of 10,000 layers that are all different takes some 15 MB.
MAX_BYTES = 64 * 2**20

E903 = declare(
    "E903",
    "a compiled folder that cannot be read",
    """
    `load_compiled(folder)` reads what `mambadsl compile -o folder` wrote: graph.json and plan.json of the
    same compilation. The message says what is missing, or that the two do not belong together.
    """,
)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled model: checked graph, plan, and the part set that it was compiled for."""

    checked: CheckedGraph
    plan: Plan
    parts: str
    sha256: str

    def build(self, *, stage: int | None = None, **how: Any) -> Any:
        """The whole model, or one stage of the plan, as a torch module (see `mambadsl.build.model.build`)."""
        from mambadsl.build.model import build

        plan = self.plan if stage is not None else None
        return build(self.checked, plan=plan, stage=stage, parts=how.pop("parts", self.parts), **how)


def save(program: Any, plan: Plan, folder: str | Path, *, parts: str = "reference") -> tuple[Path, ...]:
    """Writes the folder (made if need be; its files of the same names are replaced) and returns the paths."""
    from mambadsl.show.plan import plan_text
    from mambadsl.show.summary import summary_text

    graph = program.layers
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = graph_json.content_hash(graph_json.to_data(graph))
    plan_data = {"version": graph_json.VERSION, "graph": sha256, "parts": parts, "plan": plan.to_json()}
    plan_data = {"sha256": graph_json.content_hash(plan_data), **plan_data}
    texts = {
        "graph.json": graph_json.dumps(graph),
        "plan.json": json.dumps(plan_data, indent=1, ensure_ascii=False) + "\n",
        "summary.txt": summary_text(graph) + "\n" + plan_text(plan),
    }
    paths = []
    for name, text in texts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def load_compiled(folder: str | Path) -> Compiled:
    """Reads a compiled folder. Raises MdlError where it is not one, or was changed."""
    folder = Path(folder)
    graph = graph_json.loads(_read(folder / "graph.json"), name=str(folder / "graph.json"))
    sha256 = graph_json.content_hash(graph_json.to_data(graph))
    name = folder / "plan.json"
    try:
        data = json.loads(_read(name))
        expected, version = data.pop("sha256"), data["version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refuse(f"`{name}` is not a compiled plan") from None
    if version != graph_json.VERSION:
        raise _refuse(f"`{name}` has format {version}; this version reads {graph_json.VERSION}")
    if graph_json.content_hash(data) != expected:
        raise _refuse(f"`{name}` was changed: its content does not have the hash it carries")
    try:
        belongs, parts, plan = data["graph"], data["parts"], Plan.from_json(data["plan"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError):
        raise _refuse(f"`{name}` is not a compiled plan") from None
    if belongs != sha256 or [p for s in plan.stages for p in s.paths] != [n.path for n in graph.nodes]:
        raise _refuse(f"graph.json and plan.json in `{folder}` are of different compilations")
    return Compiled(check(graph), plan, parts, sha256)


def _read(path: Path) -> str:
    """A regular file of a sensible size."""
    try:
        if path.exists() and not path.is_file():
            raise _refuse(f"`{path}` is not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise _refuse(f"`{path}` is larger than any compiled model ({MAX_BYTES // 2**20} MiB)")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise _refuse(f"`{path}` cannot be read: {reason}") from None


def _refuse(message: str) -> MdlError:
    return MdlError([Diagnostic(E903, message)])
