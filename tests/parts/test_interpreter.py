"""Where there is a GPU, what runs in Triton's interpreter does so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest


@pytest.mark.skipif(interpreter.INTERPRETED, reason="without a GPU, every process interprets")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "interpreted"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
