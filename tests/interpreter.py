"""Triton's interpreter, for tests of kernels on a CPU.

    pytestmark = interpreter.ONLY       # or, of a class or function: @interpreter.only

Without a GPU every test process interprets (`conftest.py` says so before anybody imports Triton). With one, tests
compile what they launch, and `parts/test_interpreter.py` runs the marked ones in a process of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ONLY = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="in a process of their own: test_interpreter.py"),
]


def only(test: Any) -> Any:
    for mark in ONLY:
        test = mark(test)
    return test


def mend() -> None:
    """Two things in Triton 3.6's interpreter: NumPy 2.4 refuses how it loops to a tensor's value (int of an array of
    one); and each call of a kernel or of a function in one prepares the whole language again, for a third of the
    time. Here a module's language is prepared once: this process never needs it otherwise."""
    from triton.runtime import interpreter

    patch_tensor, patch, prepared = interpreter._patch_lang_tensor, interpreter._patch_lang, set()

    def patch_and_mend(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_once(fn):
        if fn.__module__ not in prepared:
            prepared.add(fn.__module__)
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_and_mend, patch_once


if INTERPRETED:
    mend()
