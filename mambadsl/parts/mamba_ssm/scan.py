"""The slots `mamba2.core` and `mamba2.scan` by mamba_ssm's Triton kernels; what they do is in `parts/triton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mambadsl.parts.triton import core, scan


def make_core(*, chunk: int | None = None, keep: str = "states") -> Callable[..., Any]:
    """As `parts.triton.core.make_core`."""
    return core.make_core(chunk=chunk, keep=keep, by="mamba_ssm")


def make_scan(*, chunk: int | None = None) -> Callable[..., Any]:
    """As `parts.triton.scan.make_scan`."""
    return scan.make_scan(chunk=chunk, by="mamba_ssm")
