"""Models that the tests of `show` and `cli` draw: published ones, and one with every sort of sharing."""

from __future__ import annotations

from mambadsl import load
from mambadsl.compile import Program
from mambadsl.files import MODELS

SHARED = """\
model with_shared {
  vocab = 1000
  d_model = 256
}

layer M = mamba2(heads=8, d_state=64)
layer Local = [[M F]*3 A]
shared S = [A F]
shared T = attention(heads=4, input=with_embedding)

stack {
  M*4 S M T*2 Local*2 Local [M S]*3 [M T]*2 |
  S
}

mtp(depths=2, weights=shared) { A F }
"""


def program(name: str) -> Program:
    """A shipped model by its file's name, or `shared`."""
    return load(text=SHARED) if name == "shared" else load(MODELS / f"{name}.mdl")
