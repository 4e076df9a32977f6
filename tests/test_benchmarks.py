"""The benchmarks' checks of themselves: tiny models on the CPU, so that what they call is still there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name, row, more", [
    ("train.py", "fused", ["--only", "^fused$", "--steps", "2"]),
    ("decode.py", "mambadsl, fp32 state", ["--only", "fp32 state", "--batches", "2", "--tokens", "16"]),
])
def test_rows_of_ours(name, row, more):
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / name, "--cpu", *more]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert re.search(rf"^[ \d]*{row}  +\d", ran.stdout, re.M), ran.stdout
