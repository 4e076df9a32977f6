from __future__ import annotations

import json

import pytest
from chains import hybrid, uniform

from mambadsl.plan.device import DEVICES, device, measured
from mambadsl.plan.plan import plan_units
from mambadsl.text.diagnostic import MdlError

TIMES = {"forward_s": 0.001, "backward_input_s": 0.002, "backward_weight_s": 0.003}
GOOD = {"base": "h100", "microbatch_tokens": 8192, "layers": {"stack.1": {**TIMES, "activation_bytes": 5}}}


def written(tmp_path, data):
    path = tmp_path / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_names():
    assert device("h200") is DEVICES["h200"] and device(DEVICES["cpu"]).name == "cpu"
    with pytest.raises(MdlError) as error:
        device("h20")
    assert error.value.diagnostics[0].code.id == "E820" and "h200" in error.value.diagnostics[0].help[0]


def test_a_file_of_measured_times_replaces_computed_ones(tmp_path):
    path = written(tmp_path, GOOD | {"memory_bytes": 10**9})
    mine = device(path)
    assert (mine.name, mine.memory_bytes, mine.bf16_flops) == ("mine", 10**9, DEVICES["h100"].bf16_flops)
    plain, timed = uniform(3)[0], measured(uniform(3), mine, microbatch_tokens=8192)
    assert timed[0] == plain
    assert (timed[1].forward_s, timed[1].backward_s, timed[1].activation_bytes) == (0.001, 0.005, 5)
    assert plan_units(uniform(3), device=str(path), microbatches=1).device == "mine"


def test_a_path_comes_before_a_kind(tmp_path):
    slow = {**TIMES, "forward_s": 9}
    mine = device(written(tmp_path, GOOD | {"layers": {"embed": TIMES, "stack.0": slow}}))
    chain = hybrid(0, 4)
    assert [u.forward_s for u in measured(chain, mine)][:2] == [0.001, 9]


@pytest.mark.parametrize(
    "data, message",
    [
        ("{", "is not JSON"),
        ("[" * 60_000, "is not JSON"),
        ([1], "a JSON object is needed"),
        ({"base": "b200"}, "`base` must be one of"),
        ({"base": ["h200"]}, "`base` must be one of"),
        ({"base": "h200", "memory": 1}, "there is no key `memory`"),
        ({"base": "h200", "memory_bytes": -1}, "`memory_bytes` must be a positive whole number"),
        ({"base": "h200", "memory_bytes": 1.5}, "`memory_bytes` must be a positive whole number"),
        ({"base": "h200", "usable": True}, "`usable` must be a positive number"),
        ('{"base": "h200", "usable": NaN}', "`usable` must be a positive number"),
        ({"base": "h200", "name": 3}, "`name` must be text"),
        ({"base": "h200", "layers": []}, "`layers` must be an object"),
        ({"base": "h200", "layers": {"M": TIMES}}, "`microbatch_tokens` is missing"),
        (GOOD | {"layers": {"M": 1}}, "`layers.M` must be an object"),
        (GOOD | {"layers": {"M": {}}}, "`layers.M.forward_s` is missing; it is a number, 0 or more"),
        ({}, "`base` is missing; it is one of h200"),
        ({"base": "h200", "usable": 1.5}, "`usable` must be a positive number, at most 1"),
        ({"base": "h200", "beside_transfer": 0.9}, "`beside_transfer` must be a number from 1 to 100"),
        ('{"base": "cpu", "bf16_flops": 1e-300}', "`bf16_flops` must be a positive number of a size"),
        (GOOD | {"layers": {"M": {**TIMES, "forward_s": 1e308}}}, "`layers.M.forward_s`"),
        ("\xff" + "[" * 17 * 2**20, "is larger than any file of layer times"),
        (GOOD | {"layers": {"M": {**TIMES, "forward_s": -1}}}, "`layers.M.forward_s`"),
        (GOOD | {"layers": {"M": {**TIMES, "forwards": 1}}}, "there is no key `layers.M.forwards`"),
    ],
)
def test_bad_files(tmp_path, data, message):
    with pytest.raises(MdlError) as error:
        device(written(tmp_path, data))
    assert {d.code.id for d in error.value.diagnostics} == {"E821"}
    assert any(message in d.message for d in error.value.diagnostics)


def test_times_of_ten_thousand_layers_are_read(tmp_path):
    layers = {f"stack.{n}": TIMES for n in range(10_000)}
    assert len(device(written(tmp_path, GOOD | {"layers": layers})).layer_times) == 10_000


def test_times_of_other_models_or_microbatches_are_refused(tmp_path):
    mine = device(written(tmp_path, GOOD))
    with pytest.raises(MdlError, match="8,192 tokens"):
        measured(uniform(3), mine, microbatch_tokens=4096)
    with pytest.raises(MdlError, match="no layer or kind"):
        measured(uniform(1), mine)


def test_no_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(MdlError) as error:
        device(tmp_path / "none.json")
    assert error.value.diagnostics[0].code.id == "E001"
