"""No input gets through the front of the compiler as anything but a value or an MdlError, and none takes long.

Texts that parse matter most here (tests/syntax has its own fuzz): published models and random ones, spoiled in
ways that the grammar mostly does not mind.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from front import STAGES, front
from hostile import TEXTS
from random_models import Author, spoiled

from mambadsl.files import MODELS
from mambadsl.spec.overrides import override
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text

#: CPU seconds for one input. Ordinary ones take 5 milliseconds, hostile ones up to 1 s on a slow machine.
ORDINARY, HOSTILE = 1.0, 2.5
SHIPPED = [p.read_text(encoding="utf-8") for p in sorted(MODELS.glob("*.mdl"))]


class TooSlow(BaseException):
    """Not an Exception, so that nothing swallows it."""


@contextmanager
def within(seconds: float, text: str):
    def ring(*_):
        raise TooSlow(text[:2000])

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def ended(text: str, seconds: float = ORDINARY) -> str:
    with within(seconds, text):
        try:
            return front(text)[0]
        except MdlError:
            raise
        except Exception as error:
            raise AssertionError(f"{error!r} for\n{text}") from error


def test_random_models_are_valid():
    """The generator's files get to the checker, so that spoiling them means something."""
    for seed in range(300):
        random = Random(seed)
        assert ended(Author(random, most=random.choice([2, 3, 5])).file()) in ("check", "fine"), seed


@pytest.mark.parametrize("part", range(4))
def test_spoiled_random_models(part):
    """10,000 inputs."""
    ends = Counter()
    for seed in range(part * 500, part * 500 + 500):
        random = Random(seed)
        text = Author(random, most=random.choice([1, 2])).file()
        ends.update(ended(spoiled(random, text)) for _ in range(5))
    assert ends.total() == 2500
    assert ends["resolve"] > 800 and ends["check"] > 130 and ends["fine"] > 130, ends
    assert ends["read"] < 1000, ends


@pytest.mark.parametrize("part", range(2))
def test_spoiled_published_models(part):
    """3,000 inputs."""
    ends = Counter()
    for seed in range(part * 1500, part * 1500 + 1500):
        random = Random(seed)
        ends[ended(spoiled(random, random.choice(SHIPPED)))] += 1
    assert ends.total() == 1500 and ends["resolve"] > 420 and ends["check"] > 60, ends


def test_two_halves_of_two_files():
    for seed in range(500):
        random = Random(seed)
        one, two = random.choice(SHIPPED).splitlines(), random.choice(SHIPPED).splitlines()
        ended("\n".join([*one[: random.randrange(len(one) + 1)], *two[random.randrange(len(two) + 1) :]]))


def test_options_of_any_sort():
    """`--set` with names and values of every kind, on models of every kind."""
    names = (
        "d_model",
        "M.heads",
        "A.rope",
        "wide",
        "B2.norm",
        "",
        ".",
        "a.b.c",
        "M.",
        "\u00e4",
        "vocab ",
        "layers",
    )
    values = (
        "1",
        "",
        "0",
        "-1",
        "none",
        "[",
        "3 4",
        "d_model",
        "M",
        "wide",
        "rope(theta=2)",
        "\0",
        "1e300",
        "# x",
        "'",
    )
    for seed in range(600):
        random = Random(seed)
        file = read(from_text(Author(random, most=2).file()))
        sets = {random.choice(names): random.choice(values) for _ in range(random.randint(1, 3))}
        with within(ORDINARY, str(sets)):
            try:
                resolve(override(file, sets))
            except MdlError as error:
                assert str(error)


@pytest.fixture(scope="module")
def hostile():
    """All hostile texts in one process of their own: what happened to each, in which time, and the memory."""
    script = Path(__file__).parent / "hostile.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_texts(name, hostile):
    stage, problems, seconds = hostile["seconds"][name]
    assert stage in STAGES and problems <= 150 and seconds < HOSTILE


def test_hostile_texts_take_little_memory(hostile):
    assert hostile["kib"] < 200_000
