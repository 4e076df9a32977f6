"""Exported checkpoints in Megatron-Core itself: its HybridModel takes every tensor and gives the same logits."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from on_gpu import NEEDS_GPU, error

import mambadsl
from mambadsl import export_megatron
from mambadsl.build.checkpoint import save_weights
from mambadsl.megatron.checkpoint import arguments_of

pytest.importorskip("megatron.core", reason="needs Megatron-Core")
pytest.importorskip("transformer_engine", reason="needs Transformer Engine")
pytest.importorskip("mamba_ssm", reason="needs mamba_ssm")
pytestmark = NEEDS_GPU

LENGTH = 200
TEXT = """
model small {{ vocab = 512  d_model = 256  context = 256  init_std = 0.05 }}
layer M = mamba2(heads=8, head_dim=64, d_state=64, groups=2)
layer A = attention(heads=8, kv_heads=2, head_dim=32)
layer R = A(rope=rope(theta=50000), qk_norm=per_head(eps=1e-5))
layer F = mlp(d_ff=512, act=relu2)
layer S = mlp(d_ff=512, gated=true)
layer E = moe(experts=4, top_k=2, d_ff=128, act=relu2, router=sigmoid(scale=2.5), shared_d_ff=256)
layer D = gated_delta_net(heads=4, key_heads=2, key_dim=64, value_dim=64, norm_eps=1e-5)
stack {{ {stack} }}
"""
STACKS = {"relu2": "M F M F A F", "gated": "M S R S M S", "window": "M S R(window=32) S R S", "experts": "M E A E"}


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """Megatron's process groups, of one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mambadsl.parts.mamba_ssm.load import triton_kernels

    triton_kernels()
    importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group(
        "nccl", init_method=address, rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def hybrid_model(args: dict):
    """Their model by the arguments that were exported."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = {name: value for name, value in args.items() if name in known and value is not None}
    given = {n: list(v) if isinstance(v, tuple) and n != "window_size" else v for n, v in given.items()}
    if args["squared_relu"] or args["swiglu"]:
        given["activation_func"] = squared_relu if args["squared_relu"] else F.silu
    if args["num_experts"]:
        given |= {"num_moe_experts": args["num_experts"], "moe_router_dtype": "fp32", "moe_grouped_gemm": True}
    config = TransformerConfig(**given | dict(
        gated_linear_unit=args["swiglu"], is_hybrid_model=True, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, perform_initialization=False,
    ))
    return HybridModel(
        config=config, hybrid_stack_spec=hybrid_stack_spec, vocab_size=args["vocab_size"],
        max_sequence_length=LENGTH, hybrid_layer_pattern=args["hybrid_layer_pattern"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"], rotary_base=args["rotary_base"],
        rotary_percent=args["rotary_percent"], parallel_output=True,
    ).cuda().eval()


def compared(tmp_path, stack: str) -> float:
    program = mambadsl.load(text=TEXT.format(stack=stack))
    ours = program.build(dtype="bf16", device="cuda", seed=0).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() < 2:
                # Ones and zeros would hide where they go.
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_weights(ours, tmp_path / "ours")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours")
    theirs = hybrid_model(dict(arguments_of(tmp_path / "theirs")))
    file = tmp_path / "theirs/release/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False, map_location="cuda")["model"]
    lost = theirs.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys
    assert all(name.endswith("_extra_state") for name in lost.missing_keys), lost.missing_keys
    tokens = torch.randint(0, 512, (2, LENGTH), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    positions = torch.arange(LENGTH, device="cuda").expand(2, -1)
    with torch.no_grad():
        return error(theirs(tokens, positions, None), ours(tokens))


@pytest.mark.parametrize("name", STACKS)
def test_the_same_logits(tmp_path, name):
    # A token in a hundred that rounding sends to another expert is that far off.
    assert compared(tmp_path, STACKS[name]) < (0.1 if name == "experts" else 2e-2)


def test_delta_layers(tmp_path):
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    assert compared(tmp_path, "D S M S") < 2e-2
