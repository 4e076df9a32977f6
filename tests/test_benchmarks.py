"""The benchmarks' checks of themselves: tiny models on the CPU, so that what they call is still there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name, row", [("train.py", "fused compile"), ("decode.py", "mambadsl, fp32 state")])
def test_rows_of_ours(name, row):
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / name, "--cpu"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert re.search(rf"^[ \d]*{row}  +\d", ran.stdout, re.M), ran.stdout
