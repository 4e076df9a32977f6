"""Triton's interpreter for tests on a CPU.

`rerun(__file__)` runs a test file's tests in a process of its own, where Triton interprets; in that process
`INTERPRETED` is true. It must be so before anything imports Triton, which a test process may have done long ago.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def rerun(path: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
