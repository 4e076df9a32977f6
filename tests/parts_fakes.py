"""Machines that have everything, and packages of parts that exist for one test only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mambadsl.kinds import registry as kinds
from mambadsl.parts import plugins, registry
from mambadsl.parts.machine import Machine

CPU = Machine("cpu", missing=lambda package: None)
#: An H200 with every package.
GPU = Machine("cuda", "a GPU", (9, 0), missing=lambda package: None)
#: The same without any package.
BARE = Machine("cuda", "a GPU", (9, 0), missing=lambda package: "not installed")


def gpu_with(*packages: str) -> Machine:
    """An H200 with these packages only."""
    return Machine("cuda", "a GPU", (9, 0), missing=lambda p: None if p.name in packages else "not installed")


@contextmanager
def forgotten() -> Iterator[None]:
    """What is registered inside is gone afterwards."""
    tables = (registry._own, kinds._own, plugins._files)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, old in zip(tables, before):
            table.clear()
            table.update(old)
