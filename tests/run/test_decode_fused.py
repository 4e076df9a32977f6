"""The engine with the fused steps of `parts/triton/decode`, in Triton's interpreter: the text of whole passes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import interpreter  # noqa: E402

if not interpreter.INTERPRETED:

    def test_in_the_interpreter():
        interpreter.rerun(__file__)

else:
    from small_models import graph, shaken

    from mambadsl.build.model import build
    from mambadsl.parts.triton.decode.steps import make_step
    from mambadsl.run.decode import Decoder
    from mambadsl.run.generate import generate

    LAYERS = """
    layer X = mamba2(heads=4, head_dim=8, d_state=16, groups=2, d_conv=4, chunk=32)
    layer Y = attention(heads=4, kv_heads=2, head_dim=8, rope=rope(theta=100))
    layer V = Y(window=4, qk_norm=per_head)
    layer U = mlp(d_ff=24, act=relu2)
    """
    #: A row of one token, one longer than the window; `Z` reads the first embedding, and has no fused step.
    PROMPTS, COUNT = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]], 4

    def test_fused_steps_in_the_engine():
        model = shaken(build(graph("X U Y Z V", more=LAYERS, d_model=32, tie_embeddings="true")).eval())
        wanted = generate(model, PROMPTS, max_tokens=COUNT)
        for node, sublayer in model.sublayers():
            if node.layer.label != "Z":
                sublayer.mixer.parts["step"], sublayer.has_step = make_step(), True
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
