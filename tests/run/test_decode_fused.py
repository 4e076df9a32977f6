"""The engine with the fused steps of `parts/triton/decode`, in Triton's interpreter: the text of whole passes."""

from __future__ import annotations

from contextlib import contextmanager

import interpreter
import torch
from small_models import graph, shaken
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from mambadsl.build.model import build
from mambadsl.parts.triton.decode.embed import make_embed
from mambadsl.parts.triton.decode.head import make_head, make_next_token
from mambadsl.parts.triton.decode.steps import make_step
from mambadsl.run.decode import Decoder
from mambadsl.run.generate import generate

pytestmark = interpreter.ONLY

LAYERS = """
layer X = mamba2(heads=4, head_dim=8, d_state=16, groups=2, d_conv=4, chunk=32)
layer Y = attention(heads=4, kv_heads=2, head_dim=8, rope=rope(theta=100))
layer V = Y(window=4, qk_norm=per_head)
layer U = mlp(d_ff=24, act=relu2)
"""
#: A row of one token, one longer than the window; `Z` reads the first embedding, and has no fused step.
PROMPTS, COUNT = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]], 4


def small(stack, *, dtype="fp32", **settings):
    made = graph(stack, more=LAYERS, d_model=32, tie_embeddings="true", **settings)
    return shaken(build(made, dtype=dtype).eval())


def with_steps(model):
    for node, sublayer in model.sublayers():
        if node.layer.label != "Z":
            sublayer.mixer.parts["step"], sublayer.has_step = make_step(), True
    model.frame |= dict(embed_step=make_embed(), head_step=make_head(), next_token=make_next_token())
    return model


class Launches(TorchDispatchMode):
    """Names of what a GPU would be given to do: no views, no fresh memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, returned = op._schema.name.removeprefix("aten::"), op._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        if not view and name not in ("empty", "new_empty", "_unsafe_view"):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch):
    run, seen = GridExecutor.__call__, Launches()

    def launch(self, *args, **how):
        seen.names.append(self.fn.__name__)
        with _disable_current_modes():
            return run(self, *args, **how)

    with monkeypatch.context() as patched, seen:
        patched.setattr(GridExecutor, "__call__", launch)
        yield seen.names


def test_a_greedy_step_has_few_kernels_around_its_layers(monkeypatch):
    layers = ["_matvec_kernel", "_mixer_kernel", "_matvec_kernel"] * 2
    around = ["_embed_kernel", *layers, "_matvec_kernel", "add", "_runs_kernel", "_best_kernel"]
    # With a float32 stream, and logits of bfloat16 weights, nothing is widened by a kernel of its own.
    model = with_steps(small("X X", dtype="bf16", residual_dtype="fp32", embedding_multiplier=2))
    with Decoder(model, batch=1, capacity=4) as decoder:
        decoder.prefill([[1, 2]])
        with torch.no_grad(), launches(monkeypatch) as names:
            decoder._step()
    assert names == around


def test_fused_steps_in_the_engine():
    model = small("X U Y Z V", logits_multiplier=0.5, logits_softcap=3, embedding_multiplier=2)
    wanted = generate(model, PROMPTS, max_tokens=COUNT)
    with_steps(model)
    with Decoder(model, batch=3, capacity=10, prefill_chunk=3) as three:
        for _ in range(2):
            three.prefill(PROMPTS)
            assert three.run(COUNT) == wanted
        lengths = [len(prompt) + COUNT - 1 for prompt in PROMPTS]
        assert three.state.position_B.tolist() == lengths
        assert three.state.layers["stack.2"]["used"].tolist() == lengths
    with Decoder(model, batch=1, capacity=10, prefill_chunk=1) as one:
        one.prefill(PROMPTS[2:])
        assert one.run(COUNT) == wanted[2:]
