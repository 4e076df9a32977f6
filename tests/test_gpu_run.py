"""tests/gpu/run.sh runs every shipped model in one of its processes, and only in one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from shrunk import distinct

SCRIPT = (Path(__file__).parent / "gpu" / "run.sh").read_text(encoding="utf-8")
LOOPS = [shlex.split(words) for words in re.findall(r"for family in (.*?); do", SCRIPT.replace("\\\n", " "))]


@pytest.mark.parametrize("families, repeats", list(zip(LOOPS, (2, 1))), ids=["plain", "compiled"])
def test_every_model_is_run_once(families, repeats):
    parts = [Expression.compile(family) for family in families]
    for name in distinct(repeats=repeats):
        chosen = [family for family, part in zip(families, parts) if part.evaluate(lambda word, **_: word in name)]
        assert len(chosen) == 1, f"{name}: {chosen}"


def test_there_are_two_loops():
    assert len(LOOPS) == 2
