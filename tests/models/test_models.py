"""Every file in models/, found by scan: compiles, is canonical text, counts what was published, expands
and builds to the same model."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from mambadsl.compile import load
from mambadsl.files import MODELS
from mambadsl.graph.checks import Facts
from mambadsl.graph.weights import all_weights
from mambadsl.show.plan import plan_text
from mambadsl.syntax.read import read
from mambadsl.syntax.write import write
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text
from mambadsl.text.source import read as read_source

NAMES = sorted(path.stem for path in MODELS.glob("*.mdl") if path.stem != "std")
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())["params"]


@cache
def program(name: str):
    return load(MODELS / f"{name}.mdl")


def text(name: str) -> str:
    return (MODELS / f"{name}.mdl").read_text(encoding="utf-8")


def test_every_published_model_has_a_file():
    assert set(NAMES) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_warnings(name):
    assert program(name).spec.name == name
    assert [d for d in program(name).diagnostics if d.severity != "info"] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_kernels_accept_it(name):
    """What was trained with mamba-ssm's kernels is legal for them, in sequences that fit their offsets."""
    facts = Facts(parts="old", length=4096)
    with_kernels = text(name) + "\nparts old : fused { mamba2.core = mamba_ssm.core }\n"
    assert [d for d in load(text=with_kernels, facts=facts).diagnostics if d.severity != "info"] == []


@pytest.mark.parametrize("name", NAMES)
def test_states_its_facts(name):
    """Each file expects its layers and parameters, and a wrong number is found out."""
    facts = re.findall(r"^expect (layers|params) [=<]=? ([\d_e]+)$", text(name), re.MULTILINE)
    assert [what for what, _ in facts] == ["layers", "params"]
    for what, number in facts:
        wrong = re.sub(rf"^(expect {what}) [=<]=? {number}$", r"\1 == 7", text(name), flags=re.MULTILINE)
        with pytest.raises(MdlError, match=what):
            load(text=wrong)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_what_was_published(name):
    assert program(name).cost().params == PUBLISHED[name]
    assert f"\nexpect params == {PUBLISHED[name]:_}\n" in text(name)


@pytest.mark.parametrize("name", [*NAMES, "std"])
def test_is_canonical_text(name):
    assert write(read(read_source(MODELS / f"{name}.mdl"))) == text(name)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    """Begins with what it is and where it is from, in lines that fit a screen."""
    head = text(name).split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    assert max(map(len, text(name).splitlines())) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_expansion_is_the_same_model(name):
    expanded = program(name).expand()
    assert load(text=expanded).layers == program(name).layers
    assert write(read(from_text(expanded, name="expanded"))) == expanded


@pytest.mark.parametrize("name", NAMES)
def test_written_graph_is_the_same_model(name):
    assert load(text=program(name).write()).layers == program(name).layers


@pytest.mark.parametrize("name", NAMES)
def test_built_module_has_these_parameters(name):
    module = program(name).build(device="meta")
    held = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert held == {key: weight.shape for key, weight in all_weights(program(name).layers).items()}
    assert sum(p.numel() for p in module.parameters()) == program(name).cost().params


@pytest.mark.parametrize("name", NAMES)
def test_expansion_reads(name, golden):
    golden(f"models/{name}.expanded.mdl", program(name).expand())


@pytest.mark.parametrize("name", NAMES)
def test_plan_reads(name, golden):
    """Four stages on H200s, at most 8192 tokens a sequence; what is too large is refused with reasons."""
    try:
        length = min(8192, program(name).layers.model.context)
        shown = plan_text(program(name).plan(stages=4, device="h200", length=length))
    except MdlError as error:
        shown = f"{error}\n"
    golden(f"models/{name}.plan.txt", shown)
