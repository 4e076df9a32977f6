"""Autotuned kernels without the tuning."""

from __future__ import annotations

import pytest

from mambadsl.run.doctor.untuned import untuned

triton = pytest.importorskip("triton")

SIZES = [(64, 3), (16, 4), (16, 2), (128, 1)]


def kernel(ran: list, monkeypatch):
    """An autotuned kernel that notes what it is run with, and no GPU is asked for."""

    def nothing(x, n, BLOCK: triton.language.constexpr):
        pass

    configs = [triton.Config({"BLOCK": block}, num_stages=stages) for block, stages in SIZES]
    tuned = triton.autotune(configs=configs, key=["n"], cache_results=True)(triton.jit(nothing))
    monkeypatch.setattr(tuned.fn, "run", lambda *args, **how: ran.append((how["BLOCK"], how["num_stages"])))
    return tuned


def test_the_smallest_block_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ran = []
    tuned = kernel(ran, monkeypatch)
    with untuned():
        tuned[1,](None, 5)
        tuned[1,](None, 6)
    assert ran == [(16, 2)] * 2 and not list(tmp_path.iterdir())


def test_afterwards_tuning_is_as_before(monkeypatch):
    autotuner = triton.runtime.autotuner.Autotuner
    before = dict(vars(autotuner))
    with pytest.raises(KeyboardInterrupt), untuned():
        assert dict(vars(autotuner)) != before
        raise KeyboardInterrupt
    assert dict(vars(autotuner)) == before
