"""What the fused decoding steps refuse, and that asking loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from decode_cases import CASES
from small_models import graph

from mambadsl.graph.graph import Role
from mambadsl.kinds.kind import Dims
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import Request
from mambadsl.parts.triton.decode.accepts import head, step

REFUSED = {
    "mamba2(residual=sandwich)": "residual form is `sandwich`",
    "mlp(norm=layernorm)": "`layernorm`",
    "attention(input=with_embedding)": "with_embedding",
    "mamba2(d_state=48)": "d_state 48",
    "mamba2(d_state=512)": "d_state 512",
    "mamba2(heads=4, head_dim=12)": "head_dim 12",
    "mamba2(d_conv=7)": "d_conv 7",
    "mamba2(d_conv=1)": "d_conv 1",
    "attention(heads=2, head_dim=288)": "head_dim 288",
    "attention(qk_norm=full_width)": "full width",
    "attention(rope=rope(scaling=dynamic(factor=2)))": "dynamic",
    "mlp(d_ff=8) + mlp(d_ff=8)": "branch of a sum",
    "moe(experts=2, top_k=1, d_ff=8)": "no fused step for moe",
    "mamba1(d_inner=8)": "no fused step for mamba1",
}


def reasons(text: str, dtype: str = "bf16") -> list[str]:
    sums = text.split(" + ")
    layers = "\n".join(f"layer Y{i} = {one}" for i, one in enumerate(sums))
    made = graph("+".join(f"Y{i}" for i in range(len(sums))), more=layers, d_model=24)
    node = next(node for node in made.nodes if node.role is Role.LAYER)
    branch = node.layer.branches[0]
    request = Request(
        f"{branch.kind}.step", branch.fields, node.dims(24), node.layer.sub, branch.branch,
        len(node.layer.branches) == 1, dtype, Machine("cuda"),
    )
    return list(step(request))


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_accepts_what_is_tested(text):
    assert reasons(text) == []


@pytest.mark.parametrize("text", REFUSED)
def test_says_why_not(text):
    found = reasons(text)
    assert len(found) == 1 and REFUSED[text] in found[0]


@pytest.mark.parametrize("norm, dtype, why", [
    ("rmsnorm", "bf16", []), ("none", "fp32", []), ("layernorm", "bf16", ["the norm is `layernorm`, not an RMS norm"]),
    ("rmsnorm", "fp16", ["computes in fp32 and bf16, not in fp16"]),
])
def test_the_head(norm, dtype, why):
    made = graph("M", norm=norm).model
    request = Request(
        "model.head_step", made, Dims(made.d_model, made.d_model), None, None, True, dtype, Machine("cuda")
    )
    assert list(head(request)) == why


def test_dtype():
    assert reasons("mlp(d_ff=8)", "fp32") == []
    assert "fp16" in reasons("mlp(d_ff=8)", "fp16")[0]


def test_asking_loads_no_torch():
    code = "import sys, mambadsl.parts.triton.decode.accepts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
