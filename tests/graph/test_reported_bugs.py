"""Problems that users of other libraries reported, as this compiler names them before anything runs."""

from __future__ import annotations

import pytest

from mambadsl.graph.checks import Facts, check
from mambadsl.graph.unroll import unroll
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text

ULTRA = "layer M = mamba2(heads=256, head_dim=64, groups=8, d_state=128) stack { M }"
GROUPS_8 = "layer M = mamba2(heads=128, groups=8) stack { M }"
FALCON_H1 = """
model falcon_h1_0_5b { d_model = 1024 vocab = 32784 }
layer M = mamba2(heads=24, head_dim=64, d_state=128, gated_norm=none)
layer A = attention(heads=8, kv_heads=2, head_dim=64, rope=rope(theta=1e11))
layer F = mlp(d_ff=2048, gated=true)
stack { [M+A F]*36 }
"""
FOUR_OF_56 = """
layer M = mamba2(heads=128, groups=8)
layer A = attention(heads=32, kv_heads=8, head_dim=128)
layer F = mlp()
stack { [[M F]*6 A F]*4 }
"""


def grouped(kv_heads: int) -> str:
    return f"layer A = attention(heads=32, kv_heads={kv_heads}, head_dim=64, rope=rope()) stack {{ A }}"


#: (where it was reported, the model, facts, errors and warnings expected, what the first of them says)
REPORTS = [
    (
        "state-spaces/mamba#360",
        "model m { d_model = 16 } layer M = mamba2(head_dim=64, d_state=64) stack { M }",
        {}, ["E101"], "32 channels",
    ),
    (
        "state-spaces/mamba#643",
        "model m { d_model = 64 } layer M = mamba2(head_dim=64, d_state=128) stack { M }",
        {"target": "mamba_ssm"}, ["E105"], "is 514",
    ),
    (
        "state-spaces/mamba#351",
        "model m { d_model = 64 } layer M = mamba2(head_dim=64, d_state=64) stack { M }",
        {"target": "mamba_ssm"}, ["E105"], "is 386",
    ),
    (
        "fla-org/flash-linear-attention#519, evaluation",
        "model m { d_model = 128 } layer M = mamba2(heads=2, head_dim=64, d_state=128) stack { M }",
        {"target": "mamba_ssm", "mode": "decode"}, ["E105"], "is 514",
    ),
    ("state-spaces/mamba#449", "layer M = mamba2(chunk=50) stack { M }", {"target": "mamba_ssm"}, ["W109"], "power"),
    ("state-spaces/mamba#1015", ULTRA, {"target": "mamba_ssm", "length": 65536}, ["E120"], "2,298,478,592"),
    ("state-spaces/mamba#1015, shorter", ULTRA, {"target": "mamba_ssm", "length": 61000}, [], ""),
    ("state-spaces/mamba#1015, our own kernels", ULTRA, {"parts": "fused", "length": 65536}, [], ""),
    ("state-spaces/mamba#1015, reference parts", ULTRA, {"parts": "reference", "length": 65536}, [], ""),
    ("vllm-project/vllm#55091", ULTRA, {"target": "vllm", "tp": 32}, ["E202"], "8 cannot be split over 32"),
    ("PrimeIntellect-ai/prime-rl#2231", GROUPS_8, {"target": "megatron", "cp": 16}, [], ""),
    ("PrimeIntellect-ai/prime-rl#2231, groups not copied", GROUPS_8, {"cp": 16}, ["E203"], "in 8 groups"),
    ("NVIDIA/Megatron-LM#1304", "stack { M*30 }", {"target": "megatron", "pp": 4}, ["E210"], "30 layers"),
    ("NVIDIA/Megatron-LM#1304, balanced by this compiler", "stack { M*30 }", {"pp": 4}, [], ""),
    ("pytorch/torchtitan#2577", grouped(2), {"tp": 8}, ["E205"], "2 cannot be split over 8"),
    ("huggingface/transformers#48307", grouped(4), {"tp": 8}, ["E205"], "4 cannot be split over 8"),
    ("huggingface/transformers#48307, vLLM", grouped(4), {"tp": 8, "target": "vllm"}, ["W205"], "kept 2"),
    (
        "huggingface/peft#3554", FOUR_OF_56,
        {"lora_targets": ("qkv_proj", "o_proj")}, ["W505"], "4 of 56 layers, 7.1%",
    ),
    ("unslothai/unsloth-zoo#212", FALCON_H1, {"dtype": "fp16"}, ["W305"], "fp16"),
    ("unslothai/unsloth-zoo#212, bf16", FALCON_H1, {"dtype": "bf16"}, [], ""),
]


@pytest.mark.parametrize("report, text, facts, expected, says", REPORTS, ids=[r[0] for r in REPORTS])
def test_reported(report, text, facts, expected, says):
    graph = unroll(resolve(read(from_text(text))))
    try:
        found = check(graph, Facts(**facts)).diagnostics
    except MdlError as error:
        found = error.diagnostics
    found = [d for d in found if d.severity != "info"]
    assert [d.code.id for d in found] == expected
    assert not found or says in f"{found[0].message} {found[0].label}"
