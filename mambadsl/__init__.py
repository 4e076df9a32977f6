"""mambadsl: a compiler for hybrid state-space / attention language models.

    import mambadsl
    program = mambadsl.load("models/nemotron_h_8b.mdl")   # MdlError carries every problem
    program.graph                                          # networkx
    plan = program.plan(stages=4, device="h200")
    model = program.build(dtype="bf16")                    # torch

Names are imported when first used, so `import mambadsl` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "mambadsl.compile",
    "Program": "mambadsl.compile",
    "MdlError": "mambadsl.text.diagnostic",
    "Diagnostic": "mambadsl.text.diagnostic",
    "Facts": "mambadsl.graph.checks",
    "Graph": "mambadsl.graph.builder",
    "form": "mambadsl.graph.builder",
    "make_layer": "mambadsl.spec.make",
    "from_networkx": "mambadsl.compile",
    "load_compiled": "mambadsl.run.compiled",
    "import_hf": "mambadsl.hf.folder",
    "export_hf": "mambadsl.hf.folder",
    "import_megatron": "mambadsl.megatron.folder",
    "export_megatron": "mambadsl.megatron.folder",
    "load_parts": "mambadsl.parts.plugins",
    "TrainStep": "mambadsl.run.step",
    "Decoder": "mambadsl.run.decode",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), "layer" if name == "make_layer" else name)
    raise AttributeError(f"module 'mambadsl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
