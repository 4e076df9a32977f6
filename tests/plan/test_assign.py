"""Which part fills each slot: precedence, arguments, sets had whole or refused, `auto` that refuses nothing."""

from __future__ import annotations

import pytest
from parts_fakes import BARE, CPU, GPU, forgotten, gpu_with

from mambadsl import load
from mambadsl.files import MODELS
from mambadsl.kinds.fields import REQUIRED, Field, Int
from mambadsl.parts import registry
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import REFERENCE, Package, Part
from mambadsl.parts.sets import SETS
from mambadsl.plan.assign import Assignment, assign
from mambadsl.show.parts import assignment_text
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.render import to_text

SIZE = Field("size", Int(1), 16, "how much at once")
COUNT = Field("n", Int(), REQUIRED, "how many")


def _odd(request):
    if request.fields.d_state % 2:
        yield f"takes an even d_state, not {request.fields.d_state}"


FAKE = Package(
    "fake", "parts of these tests", ("fake",), "pip install fake",
    parts=(
        Part("fake.scan", ("mamba2.scan",), "a scan", "fake:scan", _odd, (SIZE,), devices=("cpu", "cuda")),
        Part("fake.core", ("mamba2.core",), "a core", "fake:core", devices=("cpu", "cuda")),
        Part("fake.wide", ("mamba2.scan",), "bf16 only", "fake:wide", dtypes=("bf16",), capability=(9, 0)),
        Part("fake.asks", ("mlp.act",), "must be told", "fake:asks", args=(COUNT,), devices=("cpu",)),
    ),
)


@pytest.fixture(autouse=True)
def fake():
    with forgotten():
        registry.add(FAKE)
        yield


def chosen(text: str, *, parts: str = "probe", machine: Machine = CPU, dtype: str = "bf16") -> Assignment:
    return assign(load(text=text).layers, parts=parts, machine=machine, dtype=dtype)


def problems(text: str, **how) -> list:
    with pytest.raises(MdlError) as caught:
        chosen(text, **how)
    return list(caught.value.diagnostics)


def paths(found: Assignment) -> list[str]:
    return [path for row in found.rows for path in row.paths]


def model(parts: str, layer: str = "mamba2(heads=8, head_dim=32)", stack: str = "M N") -> str:
    return f"layer M = {layer}\nlayer N = {layer}\nstack {{ {stack} }}\n{parts}\n"


def test_a_layer_s_line_comes_before_its_kind_s():
    found = chosen(model("parts probe { mamba2.scan = fake.scan(size=4) M.scan = fake.scan(size=8) }"))
    # Two layers alike, but for their names: each has its own row.
    sizes = {row.label: [c.args.size for c in row.choices if c.slot == "mamba2.scan"] for row in found.rows[1:]}
    assert sizes == {"M": [8], "N": [4]}
    assert found.of("stack.0")["scan"].args.size == 8 and found.of("stack.1")["scan"].args.size == 4


def test_a_block_comes_before_its_base():
    found = chosen(model("parts probe : base { mamba2.scan = fake.scan } parts base { M.scan = reference }"))
    assert found.of("stack.0")["scan"].part == "fake.scan"
    base = chosen(model("parts probe : base { } parts base { mamba2.scan = fake.scan }"))
    assert base.of("stack.0")["scan"].part == "fake.scan"


def test_a_base_that_is_a_set():
    found = chosen(model("parts probe : fused { N.scan = fake.scan }"), machine=GPU)
    assert found.of("stack.0")["core"].part == "triton.core"
    # A narrow slot asked for by itself is not hidden behind the base's wide part.
    assert found.of("stack.1")["core"].part is None and found.of("stack.1")["scan"].part == "fake.scan"
    assert found.of("model")["loss"].part == "triton.linear_cross_entropy"


def test_older_gpus_have_the_package_s_scan():
    """Our scan wants the shared memory of an H100."""
    older = Machine("cuda", "an A100", (8, 0), missing=lambda package: None)
    slots = chosen(model("parts probe : fused { }"), machine=older).of("stack.0")
    assert (slots["core"].part, slots["scan"].part) == ("mamba_ssm.core", "mamba_ssm.scan")
    assert ("triton.core", "needs compute capability 9.0; this GPU has 8.0") in slots["core"].refused


def test_a_wide_part_leaves_narrow_slots_what_it_does_not_do():
    found = chosen(model("parts probe { mamba2.core = fake.core }"))
    slots = found.of("stack.0")
    assert slots["core"].part == "fake.core"
    assert {slots[name].covered_by for name in ("conv", "scan", "gate_norm")} == {"core"}
    assert slots["in_proj"].covered_by is None


def test_a_layer_s_narrow_line_comes_before_its_kind_s_wide_one():
    found = chosen(model("parts probe { mamba2.core = fake.core N.scan = fake.scan }"))
    assert found.of("stack.0")["core"].part == "fake.core"
    assert found.of("stack.1")["core"].part is None and found.of("stack.1")["scan"].part == "fake.scan"
    # In one block and of one rank, the wide line runs where it can, and the narrow one where it does not.
    both = chosen(model("parts probe { mamba2.core = fake.core mamba2.scan = fake.scan }"))
    slots = both.of("stack.0")
    assert slots["core"].part == "fake.core" and slots["scan"].part == "fake.scan"
    assert slots["scan"].covered_by == "core"


@pytest.mark.parametrize(
    "line, words, help",
    [
        ("mamba2.scan = fake.scan(sise=4)", "has no field `sise`", "did you mean `size`?"),
        ("mamba2.scan = fake.scan(size=0)", "`size` must be at least 1, not 0", "the least is 1"),
        ("mamba2.scan = fake.scan(size=big)", "`size` must be a whole number", ""),
        ("mamba2.scan = fake.scn", "there is no part `fake.scn`", "did you mean `fake.scan`?"),
        ("mamba2.scan = fake.core", "`fake.core` does not fill `mamba2.scan`", "fake.scan"),
        ("mamba2.scan = nobody.scan", "there is no part `nobody.scan`", "mamba_ssm.scan"),
    ],
)
def test_a_line_that_names_a_part_wrongly(line, words, help):
    found = problems(model(f"parts probe {{ {line} }}"))
    assert {d.code.id for d in found} == {"E907"}
    assert words in found[0].message and help in " ".join(found[0].help)
    assert found[0].span.text.startswith("mamba2.scan")


def test_arguments_that_must_be_given():
    one, = problems("stack { mlp(d_ff=64) } parts probe { mlp.act = fake.asks }")
    assert one.code.id == "E907" and "needs `n`" in one.message
    found = chosen("stack { mlp(d_ff=64) } parts probe { mlp.act = fake.asks(n=3) }")
    assert found.of("stack.0")["act"].text == "fake.asks(n=3)"


def test_sizes_that_a_part_does_not_take_name_line_and_layer():
    text = model("parts probe { mamba2.scan = fake.scan }", "mamba2(heads=8, head_dim=32, d_state=15)", "M")
    one, = problems(text)
    assert one.code.id == "E902" and one.notes == ("fake.scan: takes an even d_state, not 15",)
    assert one.span.text.startswith("mamba2.scan") and one.labels[0].span.text.startswith("mamba2(")


def test_dtype_capability_and_device_are_reasons():
    text = model("parts probe { mamba2.scan = fake.wide }", stack="M")
    assert problems(text)[0].notes == ("fake.wide: runs on cuda, not on cpu",)
    assert "computes in bf16, not in fp32" in problems(text, machine=GPU, dtype="fp32")[0].notes[0]
    old = Machine("cuda", "an older GPU", (8, 6), missing=lambda package: None)
    assert "compute capability 9.0; this GPU has 8.6" in problems(text, machine=old)[0].notes[0]
    unknown = Machine("cuda", missing=lambda package: None)
    assert chosen(text, machine=unknown).of("stack.0")["scan"].part == "fake.wide"


def test_a_missing_package_says_how_to_install_it():
    one, = problems(model("parts probe { mamba2.scan = fake.scan }", stack="M"), machine=BARE)
    assert one.notes == ("fake.scan: fake not installed",) and one.help[0] == "pip install fake"


@pytest.mark.parametrize("parts", ["fused", "te", "inference", "auto"])
def test_packages_fill_what_we_have_no_kernels_of(parts):
    """Where they are, and for what they take; the rest is torch's, said with the reason."""
    text = """
        model m { d_model = 256 }
        layer One = mamba3(heads=4, d_state=64)
        layer Many = One(rank=2)
        layer Unit = rg_lru(blocks=4)
        layer Mean = wkv4(d_inner=64)
        stack { One Many Unit Mean }
    """
    found = chosen(text, parts=parts, machine=GPU)
    one, many, unit, mean = (found.of(f"stack.{n}") for n in range(4))
    assert one["core"].part == "mamba_ssm.siso" and one["scan"].covered_by == one["gate_norm"].covered_by == "core"
    assert many["core"].part == REFERENCE and many["scan"].covered_by is None
    assert "takes one input a head, not rank=2" in many["core"].refused[0][1]
    assert (unit["scan"].part, mean["scan"].part) == ("fla.decaying_sums", "fla.weighted_means")
    if parts != "te":
        found = chosen(text, parts=parts, machine=gpu_with("torch", "triton"))
        for n, slot in enumerate(("core", "core", "scan", "scan")):
            assert found.of(f"stack.{n}")[slot].part == REFERENCE


@pytest.mark.parametrize("parts", ["fused", "inference"])
@pytest.mark.parametrize("layers", ["M A F E", "M+A F", "[M F]*3 A(window=64) E"])
def test_torch_and_triton_are_all_that_our_own_sets_need(parts, layers):
    found = chosen(layers, parts=parts, machine=gpu_with("torch", "triton"))
    assert {name.partition(".")[0] for name in found.used} <= {"torch", "triton", "reference"}
    cores = [slots["core"].part for slots in map(found.of, paths(found)) if "core" in slots]
    assert cores and set(cores) == {"triton.core", "torch.attention"}


def test_mamba_1_s_scan_is_mamba_ssm_s():
    text = "layer M = mamba1() stack { M }"
    one, = problems(text, parts="fused", machine=gpu_with("torch", "triton"))
    assert one.code.id == "E902" and "`mamba1.scan`" in one.message
    assert one.help[0] == registry.package("mamba_ssm").install
    found = chosen(text, parts="fused", machine=gpu_with("torch", "triton", "mamba_ssm"))
    assert found.of("stack.0")["scan"].part == "mamba_ssm.selective_scan"
    assert found.of("stack.0")["conv"].part == "triton.conv"


def test_sizes_that_our_kernels_do_not_take_are_the_next_part_s():
    found = chosen("layer M = mamba2(heads=8, head_dim=256) stack { M }", parts="fused", machine=GPU)
    slots = found.of("stack.0")
    assert (slots["core"].part, slots["scan"].part) == ("mamba_ssm.core", "mamba_ssm.scan")
    assert slots["core"].refused == (("triton.core", "takes head_dim up to 128, not 256"),)
    assert slots["conv"].part == "triton.conv", "which has nothing against heads"
    taps = chosen("layer M = mamba2(heads=8, d_conv=9) stack { M }", parts="auto", machine=GPU).of("stack.0")
    assert taps["core"].part is None and taps["conv"].part == "fla.conv" and taps["scan"].part == "triton.scan"
    assert ("causal_conv1d.conv", "takes d_conv 2, 3 or 4, not 9") in taps["conv"].refused


def test_a_package_asked_for_by_name_is_not_replaced_by_ours():
    text = model("parts probe : fused { mamba2.core = mamba_ssm.core(keep=none) }", stack="M")
    assert chosen(text, machine=GPU).of("stack.0")["core"].text == "mamba_ssm.core(keep=none)"
    one, = problems(text, machine=gpu_with("torch", "triton", "mamba_ssm"))
    assert one.notes == ("mamba_ssm.core: causal_conv1d not installed",)


@pytest.mark.parametrize("machine", [CPU, GPU, BARE, Machine()])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["tiny", "nemotron_h_8b", "falcon_h1_1_5b", "jamba_v0_1"])
def test_auto_and_the_reference_never_refuse(name, machine, dtype):
    program = load(MODELS / f"{name}.mdl")
    for parts in ("auto", "reference"):
        found = assign(program.layers, parts=parts, machine=machine, dtype=dtype)
        branches = {path for node in program.layers.nodes for path, _, _ in node.branches()}
        assert {path for row in found.rows for path in row.paths} == {"model", *branches}
        for row in found.rows:
            assert [c.slot.partition(".")[2] for c in row.choices] == [s.name for s in registry.slots_of(row.kind)]
            assert all(c.why for c in row.choices)
        if parts == "reference":
            assert set(found.used) == {"reference"}


def test_every_part_of_a_set_exists_and_fills_its_slot():
    for part_set in SETS.values():
        for slot, names in part_set.order.items():
            assert slot in registry.all_slots()
            for name in names:
                assert name == "reference" or slot in registry.part(name).slots, (part_set.name, slot, name)


@pytest.mark.parametrize("parts", ["fused", "te", "inference"])
def test_tables_of_a_published_model(parts, golden):
    registry._own.clear()
    program = load(MODELS / "nemotron_h_8b.mdl")
    found = assign(program.layers, parts=parts, machine=GPU)
    golden(f"parts/nemotron_h_8b.{parts}.txt", assignment_text("nemotron_h_8b", found, where="a GPU"))


def test_named_sets_are_refused_with_a_list(golden):
    registry._own.clear()
    here = Machine("cpu", missing=lambda package: "not installed" if package.name != "torch" else None)
    program = load(MODELS / "nemotron_h_8b.mdl")
    texts = []
    for parts in ("fused", "te", "inference"):
        with pytest.raises(MdlError) as caught:
            assign(program.layers, parts=parts, machine=here)
        assert {d.code.id for d in caught.value.diagnostics} == {"E902"}
        texts.append(f"--- {parts}\n" + "\n\n".join(map(to_text, caught.value.diagnostics)))
    golden("parts/refused_on_a_cpu.txt", "\n\n".join(texts).replace(str(MODELS), "models") + "\n")
    assert "pip install" not in texts[0], "installing does not help without a GPU"


def test_a_layer_that_reads_what_is_aside_has_no_fused_step():
    layers = "layer M = mamba2(heads=8) layer T = mlp(d_ff=64, residual=aside) "
    found = chosen(layers + "stack { M T M }", parts="inference", machine=GPU)
    steps = {path: found.of(path)["step"] for path in ("stack.0", "stack.1", "stack.2")}
    assert [steps[path].part for path in steps] == ["triton.step", None, None]
    assert "form is `aside`" in steps["stack.1"].refused[0][1]
    assert "past the stream" in steps["stack.2"].refused[0][1]


def test_a_layer_that_gives_or_takes_has_no_fused_step():
    layers = "layer A = attention(heads=4, head_dim=64) layer F = mlp(d_ff=64) "
    found = chosen(layers + "stack { A A(gives=kv) F A(takes=kv) }", parts="inference", machine=GPU)
    steps = {path: found.of(path)["step"] for path in ("stack.0", "stack.1", "stack.2", "stack.3")}
    assert [steps[path].part for path in steps] == ["triton.step", None, "triton.step", None]
    assert all("past the stream" in steps[path].refused[0][1] for path in ("stack.1", "stack.3"))


def test_a_set_that_does_not_exist():
    one, = problems("M", parts="fusd")
    assert one.code.id == "E902" and one.help == ("did you mean `fused`?",)
