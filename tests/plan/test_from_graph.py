from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambadsl.compile import load
from mambadsl.graph.cost import costs, total
from mambadsl.plan.device import DEVICES
from mambadsl.plan.from_graph import plan, units
from mambadsl.plan.plan import Plan
from mambadsl.text.diagnostic import MdlError

MODELS = Path(__file__).parents[2] / "models"
H200 = DEVICES["h200"]
HEAD = "model t { vocab = 1000\n d_model = 64\n context = 128 }\n"
STD = "layer M = mamba2(heads=4, head_dim=32, d_state=16)\nlayer F = mlp(d_ff=256)\n"


def text(stack, *, head=HEAD, layers=STD):
    return load(text=f"{head}{layers}stack {{ {stack} }}\n")


def test_units_are_the_nodes_with_all_weights_and_flops_in_order():
    program = load(MODELS / "nemotron_h_8b.mdl")
    chain = units(program.layers, device=H200)
    assert [u.path for u in chain] == [n.path for n in program.layers.nodes]
    assert sum(u.params for u in chain) == 8_100_852_736
    assert sum(u.static_bytes for u in chain) >= 18 * 8_100_852_736
    tokens = program.layers.model.context
    flops = total(costs(program.layers)).flops
    least = float(flops.forward + flops.backward) * tokens / H200.bf16_flops
    assert least <= sum(u.total_s for u in chain) <= 1.5 * least
    assert {u.out_bytes for u in chain[:-1]} == {tokens * 4096 * 2} and chain[-1].out_bytes == 0


def test_a_carried_embedding_crosses_until_its_last_reader():
    program = text("M Z M Z M M", layers=STD + "shared Z = mlp(d_ff=128, input=with_embedding)\n")
    stream = 128 * 64 * 2
    chain = units(program.layers, device=H200)
    assert [u.out_bytes // stream for u in chain] == [2, 2, 2, 2, 1, 1, 1, 0]
    shared = [u for u in chain if u.owner]
    assert [u.path for u in shared] == ["stack.1", "stack.3"] and len({u.owner for u in shared}) == 1
    assert all(u.shared_params > 0 for u in shared)
    made = plan(program.checked, stages=8, microbatches=8)
    assert made.replicas == ((shared[0].owner, (2, 4)),)


def test_what_is_given_aside_crosses_to_the_next_layer():
    program = text("M T T M M", layers=STD + "layer T = mlp(d_ff=128, residual=aside)\n")
    chain = units(program.layers, device=H200)
    assert [u.out_bytes // (128 * 64 * 2) for u in chain] == [1, 1, 2, 2, 1, 1, 0]


def test_what_layers_give_crosses_until_its_last_taker():
    """Keys and values of 2 heads of 16 channels, and a scan 48 wide, in two bytes beside a stream in four."""
    head = HEAD.replace("context", "residual_dtype = fp32\n context")
    layers = "layer A = attention(heads=4, kv_heads=2, head_dim=16, gives=kv)\nlayer T = A(gives=none, takes=kv)\n"
    layers += "layer R = mamba1(d_inner=48, gives=scan)\nlayer U = gmu(d_inner=48)\nlayer F = mlp()\n"
    chain = units(text("A R F T U F", head=head, layers=layers).layers, device=H200)
    stream, kv, scan = 64 * 4, 2 * 2 * 16 * 2, 48 * 2
    sent = [stream, stream + kv, *[stream + kv + scan] * 2, stream + scan, stream, stream, 0]
    assert [u.out_bytes for u in chain] == [128 * n for n in sent]
    again = units(text("A(recompute=true) R F T U F", head=head, layers=layers).layers, device=H200)
    assert again[1].activation_bytes == 128 * (stream + kv)


def test_a_tied_table_is_paid_on_both_ends():
    tied = text("M F M F", head=HEAD.replace("128 }", "128\n tie_embeddings = true }"))
    made = plan(tied.checked, stages=2)
    assert made.replicas == (("embed", (0, 1)),)
    assert all(stage.params > 1000 * 64 for stage in made.stages)
    assert plan(text("M F M F").checked, stages=2).replicas == ()


def test_recompute_trades_memory_for_time():
    plain = units(text("M F").layers, device=H200)
    again = units(text("M G", layers=STD + "layer G = F(recompute=true)\n").layers, device=H200)
    a, b = plain[2], again[2]
    assert b.backward_s == pytest.approx(a.backward_s + a.forward_s) and b.forward_s == a.forward_s
    assert b.activation_bytes == 128 * 64 * 2 < a.activation_bytes == b.working_bytes


def test_marks_of_the_text_and_their_places():
    program = text("M F | M F M")
    assert plan(program.checked).cuts == (0, 3, 7)
    with pytest.raises(MdlError) as error:
        plan(program.checked, stages=3)
    (problem,) = error.value.diagnostics
    assert problem.code.id == "E801" and problem.span.text == "|"


def test_microbatches_scale_the_work():
    program = text("M F M | F M F")
    one, four = (plan(program.checked, sequences=n, device="cpu") for n in (1, 4))
    assert four.stages[0].activation_bytes == 4 * one.stages[0].activation_bytes
    assert one.step_s < four.step_s < 4.1 * one.step_s
    assert four.stages[0].static_bytes == one.stages[0].static_bytes


def test_a_plan_comes_back_from_json():
    import json

    for options in ({"stages": 3}, {"stages": 2, "schedule": "zbv"}):
        made = plan(text("M F M F M F").checked, **options)
        assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("name", sorted(p.stem for p in MODELS.glob("*.mdl") if p.stem != "std"))
def test_every_published_model_is_planned_or_says_why_not(name):
    program = load(MODELS / f"{name}.mdl")
    start = time.thread_time()
    try:
        made = plan(program.checked, stages=4, length=4096)
        assert [path for s in made.stages for path in s.paths] == [n.path for n in program.layers.nodes]
        assert max(made.peak_bytes) <= made.memory_limit
    except MdlError as error:
        assert {d.code.id for d in error.diagnostics} <= {"E803"}
    assert time.thread_time() - start < 2


def test_planning_loads_nothing_slow():
    code = (
        "import sys, mambadsl.plan.from_graph, mambadsl.show.plan\n"
        "assert not {'torch', 'numpy', 'networkx', 'lark', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_in_messages_agree_with_their_nouns():
    def said(stack, **how):
        with pytest.raises(MdlError) as error:
            plan(text(stack).checked, **how)
        return str(error.value)

    assert "1 cut `|` makes 2 stages, not 3" in (one := said("M | M", stages=3)) and "ask for 2 stages" in one
    assert "ask for 1 rank with 2 stages each" in said("M | M", stages=2, schedule="interleaved")
    assert "`1f1b` on 2 ranks cannot run 1 microbatch\n" in said("M M", stages=2, microbatches=1)
    tight = said("M M", stages=1, memory_limit=2**20)
    assert "no split into 1 stage fits: 1.0 MiB a rank" in tight
    assert "GiB" not in tight


def test_a_batch_has_tokens_and_a_unit_a_stage():
    checked = text("M M").checked
    for wrong in dict(length=0), dict(sequences=-1):
        with pytest.raises(ValueError, match="must be at least 1"):
            plan(checked, **wrong)
    with pytest.raises(ValueError, match="no stage has a unit `stack.7`"):
        plan(checked).stage_of("stack.7")
