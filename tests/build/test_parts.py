"""Building with parts: what fills a slot is called, with its arguments, and nothing else of the model changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from parts_fakes import forgotten
from small_models import EVERYTHING, graph, shaken

from mambadsl.build.model import build
from mambadsl.kinds.fields import Field, Int, OneOf
from mambadsl.kinds.mamba2.module import Module as Mamba2
from mambadsl.kinds.norm import rms_norm
from mambadsl.parts import registry
from mambadsl.parts.part import Package, Part
from mambadsl.text.diagnostic import MdlError

CALLS: list[tuple] = []
BOTH = ("cpu", "cuda")


def _spy(name, function):
    def make(**args):
        def call(*inputs, **more):
            CALLS.append((name, args))
            return function(*inputs, **more)

        return call

    return make


def _loss(x, weight, targets, *, multiplier, softcap):
    logits = torch.nn.functional.linear(x, weight).float() * multiplier
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


SPIES = Package(
    "spy", "the reference, and a note of each call", ("torch",),
    parts=(
        Part("spy.scan", ("mamba2.scan",), "", _spy("scan", Mamba2.REFERENCE["scan"]), devices=BOTH, args=(
            Field("size", Int(1), 4, "of nothing"), Field("mode", OneOf("quick", "exact"), "quick", "of nothing"),
        )),
        Part("spy.norm", ("model.norm",), "", _spy("norm", rms_norm), devices=BOTH),
        Part("spy.loss", ("model.loss",), "", _spy("loss", _loss), devices=BOTH),
    ),
)


@pytest.fixture(autouse=True)
def _spies():
    CALLS.clear()
    with forgotten():
        registry.add(SPIES)
        yield


def test_parts_are_called_with_their_arguments():
    block = "parts mine { mamba2.scan = spy.scan(size=8, mode=exact) model.norm = spy.norm model.loss = spy.loss }"
    made = graph("M F M A", more=block)
    plain, mine = shaken(build(made)), shaken(build(made, parts="mine"))
    tokens = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(tokens), plain(tokens))
    called = [name for name, _ in CALLS]
    # Four sublayers' norms and the last one.
    assert called.count("scan") == 2 and called.count("norm") == 5
    assert [args for name, args in CALLS if name == "scan"] == [{"size": 8, "mode": "exact"}] * 2
    torch.testing.assert_close(mine.loss(tokens), plain.loss(tokens))
    assert CALLS[-1][0] == "loss"


def test_one_layer_s_part_leaves_the_others_alone():
    block = "layer O = M parts mine { O.scan = spy.scan }"
    mine = build(graph("M O", more=block), parts="mine")
    mine(torch.zeros((1, 3), dtype=torch.int64))
    assert [name for name, _ in CALLS] == ["scan"]
    assert mine.assignment.of("stack.0")["scan"].part == "reference"


def test_layers_alike_have_one_function():
    """torch.compile tells functions apart by what they are."""
    mine = build(graph("M M M", more="parts mine { mamba2.scan = spy.scan }"), parts="mine")
    assert len({id(sublayer.mixer.parts["scan"]) for _, sublayer in mine.sublayers()}) == 1


@pytest.mark.parametrize("parts", ["reference", "auto", "mine"])
def test_weights_are_the_same_whatever_runs(parts):
    block = "parts mine : auto { mamba2.scan = spy.scan model.norm = spy.norm }"
    made = graph(EVERYTHING, more=block)
    plain, other = build(made), build(made, parts=parts)
    assert list(plain.state_dict()) == list(other.state_dict())
    for path, tensor in plain.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[path]), path
    other.load_state_dict(plain.state_dict())


def test_auto_on_this_machine_computes_the_same():
    made = graph(EVERYTHING)
    plain, auto = shaken(build(made)), shaken(build(made, parts="auto"))
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(auto(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
    assert auto.assignment.machine.device == "cpu"


def test_our_own_parts_load_without_other_packages():
    pytest.importorskip("triton")
    code = (
        "import sys\n"
        "for name in ('mamba_ssm', 'causal_conv1d', 'transformer_engine', 'fla', 'einops'): sys.modules[name] = None\n"
        "from mambadsl.parts import registry\n"
        "for part in (*registry.package('torch').parts, *registry.package('triton').parts):\n"
        "    made = part.load()(**{field.name: field.default for field in part.args})\n"
        "    assert callable(made), part.name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_that_does_not_load_is_said():
    broken = Package(
        "broken", "raises when imported", ("torch",), "pip install broken", load="broken_module_of_this_test:load",
        parts=(Part("broken.scan", ("mamba2.scan",), "", _spy("x", None), devices=BOTH),),
    )
    registry.add(broken)
    with pytest.raises(MdlError) as caught:
        build(graph("M", more="parts mine { mamba2.scan = broken.scan }"), parts="mine")
    one, = caught.value.diagnostics
    assert one.code.id == "E902" and "broken does not load (ModuleNotFoundError" in one.notes[0]
    assert one.help[0] == "pip install broken"
