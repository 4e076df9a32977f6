"""The decoding kernels in Triton's interpreter: each step gives, token by token, what the module gives for the row."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import interpreter  # noqa: E402

if not interpreter.INTERPRETED:

    def test_in_the_interpreter():
        interpreter.rerun(__file__)

else:
    import torch
    from decode_cases import CASES, difference, past_and_future, sublayer

    from mambadsl.kinds.norm import rms_norm
    from mambadsl.kinds.tokens import Tokens
    from mambadsl.parts.triton.decode import configs, head, linear, steps
    from mambadsl.parts.triton.decode.attention import attend
    from mambadsl.parts.triton.decode.norm import RowNorm

    PATHS = ("matvec", "skinny", "cublas")
    ROWS = {1: (4,), 3: (0, 9, 3), 5: (7, 1, 12, 0, 2)}

    def follow(made, *, path, lengths, slots, steps_taken=3, **how):
        """Largest difference of a few steps from the module, and the states after them."""
        x_BTD, expected_BTD, state = past_and_future(made, lengths=lengths, steps=steps_taken, slots=slots, **how)
        position_B = torch.tensor(lengths)
        got = []
        for t in range(steps_taken):
            x_BD = x_BTD[:, t].clone()
            y_BD = steps.STEPS[made.mixer.kind.name](made, x_BD, position_B + t, state, path=path)
            assert y_BD.data_ptr() == x_BD.data_ptr()
            got.append(y_BD)
        return difference(torch.stack(got, 1), expected_BTD), state

    #: Forms that differ in what the projections around the mixer do.
    FEW = ("mamba2: gate after norm", "mamba2: multipliers", "attention: each its own", "mlp: relu2", "mlp: gated")

    @pytest.mark.parametrize("path, rows, name", [
        *(("matvec", 3, name) for name in CASES), *(("matvec", 1, name) for name in FEW),
        *(("skinny", 5, name) for name in CASES), *(("cublas", 5, name) for name in FEW),
    ])
    def test_steps_are_the_module(path, rows, name):
        # Widths of norm groups that one way leaves to another.
        path = None if "odd" in name and path == "matvec" else path
        worst, state = follow(sublayer(CASES[name]), path=path, lengths=ROWS[rows], slots=20, steps_taken=2)
        assert worst < 1e-5
        if "used" in state:
            assert state["used"].tolist() == [n + 2 for n in ROWS[rows]]

    @pytest.mark.parametrize("slots", [4, 5, 7, 64])
    def test_window_in_a_ring(slots):
        made = sublayer(CASES["attention: window"])
        worst, _ = follow(made, path="cublas", lengths=(3, 4, 11, 40), slots=slots, steps_taken=5)
        assert worst < 1e-5

    @pytest.mark.parametrize("splits", [1, 3, 8])
    @pytest.mark.parametrize("name", ["attention: grouped", "attention: window", "attention: softcap"])
    def test_splits_of_keys(name, splits, monkeypatch):
        monkeypatch.setattr(steps, "attend", lambda *args, **how: attend(*args, splits=splits, **how))
        worst, _ = follow(sublayer(CASES[name]), path="cublas", lengths=(0, 16, 70, 33), slots=128, steps_taken=2)
        assert worst < 1e-5

    def test_states_after_steps_are_those_of_prefill():
        made = sublayer(CASES["mamba2: groups"])
        for path in PATHS[:2]:
            x_BTD, _, state = past_and_future(made, lengths=(2, 2), steps=4, slots=1)
            _, _, whole = past_and_future(made, lengths=(2, 2), steps=4, slots=1)
            wanted = {name: t.clone() for name, t in whole.items()}
            made(x_BTD, None, Tokens.plain(2, 4), [wanted])
            for t in range(4):
                steps.STEPS["mamba2"](made, x_BTD[:, t].clone(), torch.tensor([2, 2]) + t, state, path=path)
            for name in wanted:
                assert difference(state[name], wanted[name]) < 1e-5, name

    def test_stream_of_another_dtype():
        """A float32 stream around narrower weights: sums are not rounded to the weights' dtype on the way."""
        made = sublayer(CASES["mlp: silu"], dtype=torch.float16)
        x_BTD, expected_BTD, state = past_and_future(made, lengths=(0,), steps=1, slots=1, stream=torch.float32)
        y_BD = steps.mlp(made, x_BTD[:, 0].clone(), torch.zeros(1, dtype=torch.int64), state, path="matvec")
        assert y_BD.dtype == torch.float32
        assert difference(y_BD, expected_BTD[:, 0]) < 2e-3

    @pytest.mark.parametrize("columns", [16, 64, 4096])
    @pytest.mark.parametrize("width", [48, 100, 256])
    def test_blocks_of_a_matvec(columns, width):
        generator = torch.Generator().manual_seed(0)
        x_BK, weight_NK, scale_K = (torch.randn(*n, generator=generator) for n in ((3, width), (37, width), (width,)))
        norm = RowNorm(scale_K, 1e-5)
        y_BN = linear.norm_linear(
            x_BK, weight_NK, norm=norm, path="matvec", tile=configs.Block(elements=8 * columns, columns=columns)
        )
        assert difference(y_BN, rms_norm(x_BK, scale_K, eps=1e-5) @ weight_NK.T) < 1e-5

    def test_logits_and_the_most_likely():
        made = sublayer(CASES["mlp: silu"])
        weight_VD = torch.randn(2500, 24, generator=torch.Generator().manual_seed(0))
        x_BD = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
        expected_BV = made.norm(x_BD) @ weight_VD.T * 0.5
        for path in PATHS:
            logits_BV = head.logits(made.norm, x_BD, weight_VD, scale=0.5, path=path)
            assert difference(logits_BV, expected_BV) < 1e-5
            assert torch.equal(head.most_likely(logits_BV), expected_BV.argmax(-1))
        ties = torch.zeros(1, 2500)
        ties[0, [1030, 2400]] = 1
        assert head.most_likely(ties).tolist() == [1030]
