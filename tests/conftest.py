"""Shared fixtures. `pytest --renew` writes golden files anew; review them as a diff."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Side by side, processes that take every core each are in each other's way. Said before anybody imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples each time, so that what passed passes again; `HYPOTHESIS_PROFILE=search pytest` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Without a GPU, Triton interprets its kernels. Said before anybody imports Triton.
if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--renew", action="store_true", help="write the golden files anew")


def pytest_collection_modifyitems(items):
    """The longest first, so that no core waits for another at the end."""
    items.sort(key=lambda item: item.path.parent.name != "train")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker has a half of the list, with what it imports, makes once and keeps; who is done first takes of the
    other's."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def golden(request):
    """golden("name.txt", text): equal to tests/golden/name.txt, or writes it with --renew."""

    def compare(name: str, text: str) -> None:
        path = ROOT / "golden" / name
        if request.config.getoption("--renew"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {path.name}; run pytest --renew"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def fresh_compiler():
    """What torch.compile has made for other tests does not count, and what it makes is gone afterwards."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def frozen_heap():
    """For tests of time: what other tests have left in memory is not gone through again and again meanwhile."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
