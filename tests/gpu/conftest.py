"""For all tests on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from mambadsl.run.doctor.untuned import untuned


@pytest.fixture(autouse=True, scope="module")
def _no_tuning():
    """Which launches are fastest is no question here. Kernels are compiled, or these tests show nothing."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "TRITON_INTERPRET=0 pytest ...: conftest.py saw no GPU"
    with untuned():
        yield


@pytest.fixture(autouse=True, scope="module")
def _exact_products():
    """The reference's float32 is float32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
