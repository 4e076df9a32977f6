"""The same tests for every kind in the registry, in every form that its fields take.

A new folder under kinds/ is tested here without a line added; `BASE` only keeps known kinds small.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from typing import Any

import pytest
import torch
from kind_values import module, values
from ragged import REAL, part_of, ragged
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mambadsl.kinds.fields import (
    REQUIRED,
    Call,
    Field,
    Flag,
    Int,
    Mismatch,
    OneForm,
    OneOf,
    OrWord,
    Real,
    Type,
    Word,
)
from mambadsl.kinds.kind import Dims, Kind
from mambadsl.kinds.past import see, with_places
from mambadsl.kinds.registry import all_kinds, get
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant

#: Small sizes with more than one head, group and chunk. A kind that is not here has its defaults.
BASE: dict[str, dict[str, Any]] = {
    "gated_delta_net": dict(heads=4, key_heads=2, key_dim=5, value_dim=6, chunk=4),
    "kimi_delta": dict(heads=3, key_dim=5, value_dim=6, decay_rank=4, gate_rank=7, chunk=4),
    "attention": dict(heads=4, kv_heads=2),
    "cca": dict(heads=4, kv_heads=2),
    "lightning": dict(heads=4, head_dim=6, chunk=4),
    "mamba1": dict(d_state=4, chunk=4),
    "mamba2": dict(heads=4, head_dim=8, groups=2, d_state=8, chunk=4),
    "mamba3": dict(heads=4, head_dim=6, groups=2, d_state=8, chunk=4),
    "mlp": dict(d_ff=20),
    "mlstm": dict(heads=3, key_dim=4, value_dim=6, chunk=4),
    "wkv4": dict(d_inner=12, chunk=4),
    "channel_mix": dict(d_ff=20),
    "rg_lru": dict(d_inner=12, blocks=3, chunk=4),
    "mla": dict(heads=3, nope_dim=5, rope_dim=4, value_dim=6, kv_rank=7, q_rank=9),
    "moe": dict(experts=6, top_k=2, d_ff=12, shared_d_ff=10),
}
DIMS = Dims(d_model=16, d_in=24)
KINDS = [kind.name for kind in all_kinds()]


# Every form of every kind: the base, and the base with one field changed.


def others(type: Type, value: Any) -> Iterator[Any]:
    """Other values of a field's type, one thing changed at a time; none for plain sizes."""
    match type:
        case Flag():
            yield not value
        case OneOf():
            yield from (word for word in type.words if word != value)
        case OneForm():
            for name in type.forms:
                form = value if name == value.name else type.convert(Word(name))
                if name != value.name:
                    yield form
                for field in type.forms[name]:
                    for other in others(field.type, form.values[field.name]):
                        yield Variant(name, form.values.replace(**{field.name: other}))
        case OrWord(type=Int()):
            yield 3
        case OrWord() | Real():
            number = type.type if isinstance(type, OrWord) else type
            for fraction in (Fraction(3, 2), Fraction(1, 2)):
                try:
                    yield number.convert(fraction)
                    return
                except Mismatch:
                    continue


def forms(kind: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    base = BASE.get(kind.name, {})
    yield "base", base
    filled = values(kind.name, d_model=DIMS.d_model, **base)
    for field in kind.fields:
        for other in others(field.type, filled[field.name]):
            yield f"{field.name}={field.type.text(other)}", {**base, field.name: other}


CASES = [
    pytest.param(kind.name, given, id=f"{kind.name}: {name}")
    for kind in all_kinds()
    for name, given in forms(kind)
]
every_form = pytest.mark.parametrize("kind, given", CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Fed:
    """A kind's module that gives or takes, as one that does neither: what it takes is made of each token of x, and what
    it gives is left out."""

    def __init__(self, made: Any):
        self.made = made
        #: By the id of a layer's state, that of its giver.
        self.past: dict[int, tuple[dict, dict]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def to(self, dtype: torch.dtype) -> Fed:
        return Fed(self.made.to(dtype))

    def __call__(self, x: Tensor, tokens: Tokens, state: dict | None = None) -> Tensor:
        more = taken(self.made, x)
        for carried in self.made.kind.takes(self.f, self.dims):
            if carried.kept:
                entries = dict(zip(carried.kept, more[carried.name].unbind(2)))
                more[carried.name] = see(self._past(state, entries), entries, tokens)
        y = self.made(x, tokens, state, **more)
        return y[0] if self.made.gives else y

    def _past(self, state: dict | None, entries: dict[str, Tensor]) -> dict | None:
        if state is None:
            return None
        empty = with_places({name: t[:, :0] for name, t in entries.items()})
        return self.past.setdefault(id(state), (state, empty))[1]


def fed(made: Any) -> Any:
    return Fed(made) if made.takes or made.gives else made


def taken(made: Any, x: Tensor) -> dict[str, Tensor]:
    """What the layer takes, as a function of each token of x."""
    found = {}
    for carried in made.kind.takes(made.f, made.dims):
        channels = torch.arange(carried.width)
        mine = x[..., channels % x.shape[-1]] * channels.add(1).sin().to(x)
        found[carried.name] = mine.unflatten(-1, carried.shape)
    return found


def built(kind: str, given: dict[str, Any]):
    return fed(module(kind, d_model=DIMS.d_model, d_in=DIMS.d_in, **given))


def inputs(batch: int, length: int, *, seed: int = 1, width: int = DIMS.d_in) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def near(mine: Tensor, truth: Tensor, *, scale: float = 1) -> None:
    torch.testing.assert_close(mine, truth, rtol=1e-4 * scale, atol=2e-5 * scale)


def chunks(made, x: Tensor, tokens: Tokens, cuts: tuple[int, ...], state: dict | None = None) -> Tensor:
    """The rows in chunks that end at `cuts`, through one state."""
    state = made.init_state(x.shape[0], dtype=x.dtype) if state is None else state
    bounds = (0, *cuts, x.shape[1])
    return torch.cat([made(x[:, a:b], part_of(tokens, a, b), state) for a, b in zip(bounds, bounds[1:])], 1)


# Fields.


def read(text: str) -> Any:
    """A value's text as the language's values, read independently of the compiler."""
    tokens = re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?|\w+|[()\[\]=,]", text)

    def value() -> Any:
        token = tokens.pop(0)
        if token == "[":
            items = []
            while tokens[0] != "]":
                items.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return items
        if token in ("true", "false"):
            return token == "true"
        if token[0].isdigit() or token[0] == "-":
            return Fraction(token)
        if not tokens or tokens[0] != "(":
            return Word(token)
        args = {}
        while tokens.pop(0) != ")":
            name = tokens.pop(0)
            assert tokens.pop(0) == "="
            args[name] = value()
        return Call(token, args)

    found = value()
    assert not tokens, f"left over in {text!r}: {tokens}"
    return found


def all_fields(fields: tuple[Field, ...]) -> Iterator[Field]:
    for field in fields:
        yield field
        type = field.type.type if isinstance(field.type, OrWord) else field.type
        if isinstance(type, OneForm):
            for inner in type.forms.values():
                yield from all_fields(inner)


@every_kind
def test_fields_are_documented(kind):
    kind = get(kind)
    assert kind.doc and kind.source and not kind.doc.endswith(".")
    assert len({f.name for f in kind.fields}) == len(kind.fields)
    for field in all_fields(kind.fields):
        assert re.fullmatch("[A-Za-z][A-Za-z0-9_]*", field.name)
        assert len(field.doc) > 8 and "\n" not in field.doc and not field.doc.endswith("."), field
        assert isinstance(field.type, Type) and field.type.says != Type.says
    for slot in kind.slots:
        assert re.fullmatch("[a-z][a-z0-9_]*", slot.name) and slot.doc


def test_colors_tell_kinds_apart():
    colors = [kind.color for kind in all_kinds()]
    assert len(set(colors)) == len(colors)
    # Light: dark text is read on them.
    assert all(min(bytes.fromhex(color.removeprefix("#"))) >= 0x80 or max(bytes.fromhex(color[1:])) > 0xE0
               for color in colors)


@every_form
def test_values_survive_being_written(kind, given):
    for field in get(kind).fields:
        value = values(kind, d_model=DIMS.d_model, **given)[field.name]
        assert field.type.convert(read(field.type.text(value))) == value


@every_kind
def test_defaults_of_forms_survive_being_written(kind):
    for field in all_fields(get(kind).fields):
        if field.default is not REQUIRED and not callable(field.default):
            assert field.type.convert(read(field.type.text(field.default))) == field.default


# Tables.


@every_form
def test_weights_are_the_state_dict(kind, given):
    f = values(kind, d_model=DIMS.d_model, **given)
    table = get(kind).weights(f, DIMS)
    made = get(kind).module()(f, DIMS, dtype=torch.bfloat16)
    declared = {w.name: (w.shape, torch.float32 if w.fp32 else torch.bfloat16) for w in table}
    assert len(declared) == len(table)
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.state_dict().items()} == declared
    assert {n for n, _ in made.named_parameters()} == {w.name for w in table if w.trained}
    for w in table:
        axis = 1 if len(w.shape) == 3 else 0
        assert not w.segments or sum(size for _, size in w.segments) == w.shape[axis]
    meta = get(kind).module()(f, DIMS, device="meta")
    assert all(t.is_meta for t in meta.state_dict().values())


@every_form
def test_state_is_what_steps_allocate(kind, given):
    f = values(kind, d_model=DIMS.d_model, **given)
    table = {s.name: s for s in get(kind).state(f, DIMS)}
    made = built(kind, given).to(torch.bfloat16)
    state = made.init_state(3, dtype=torch.bfloat16)

    def check(seen: int) -> None:
        floats = {n: t for n, t in state.items() if t.is_floating_point()}
        assert floats.keys() == table.keys()
        for name, t in floats.items():
            s = table[name]
            assert t.dtype == (torch.float32 if s.fp32 else torch.bfloat16)
            if not s.per_token:
                assert tuple(t.shape) == (3, *s.shape)
                continue
            assert (t.shape[0], *t.shape[2:]) == (3, *s.shape)
            least, most = (seen, seen) if s.window is None else (min(seen, s.window - 1), min(seen, s.window))
            assert least <= t.shape[1] <= most

    check(0)
    with torch.no_grad():
        made(inputs(3, 5).bfloat16(), Tokens.plain(3, 5), state)
        check(5)
        made(inputs(3, 1).bfloat16(), Tokens.plain(3, 1, start=5), state)
        check(6)


@every_form
def test_costs_are_positive(kind, given):
    f = values(kind, d_model=DIMS.d_model, **given)
    for length in (1, 64, 4096):
        flops = get(kind).flops(f, DIMS, length)
        assert flops.forward > 0 and flops.backward_input > 0 and flops.backward_weight > 0
    saved = get(kind).saved(f, DIMS)
    assert saved.narrow >= DIMS.d_in and saved.wide >= 0


@every_form
def test_matrix_products_cost_what_the_table_says(kind, given):
    """Per token, 2 FLOPs for each active element of the matrices: as torch counts them, and as the table
    says for gradients of weights. Weights per channel (tp "heads": convolutions) are no matrices, and
    may be computed in other ways; within 1 % for what is small beside."""
    f = values(kind, d_model=DIMS.d_model, **given)
    table = [w for w in get(kind).weights(f, DIMS) if len(w.shape) > 1 and not w.fp32]
    matrices = sum(
        2 * w.elements * w.active for w in table if w.tp != "heads" or w.name.endswith("_proj.weight")
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        built(kind, given)(inputs(2, 16), Tokens.plain(2, 16))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert products == pytest.approx(float(matrices * 2 * 16), rel=0.01)
    assert get(kind).flops(f, DIMS, 16).backward_weight == sum(2 * w.elements * w.active for w in table)


# Behaviour.


@every_form
def test_forward_and_gradients_equal_the_definition(kind, given):
    """On ragged rows; every trained weight has a gradient that is finite and not zero."""
    made = built(kind, given)
    x = inputs(4, 10).requires_grad_()
    mix = inputs(4, 10, seed=2, width=DIMS.d_model) * REAL[..., None]
    naive = import_module(f"{get(kind).package}.naive").naive
    weights = dict(made.named_parameters())

    y = made(x, ragged())
    expected, _ = naive({**weights, **dict(made.named_buffers())}, made.f, made.dims, x, ragged(), **taken(made, x))
    assert y.isfinite().all()
    near(y * REAL[..., None], expected * REAL[..., None])
    mine = torch.autograd.grad((y * mix).sum(), [x, *weights.values()])
    truth = torch.autograd.grad((expected * mix).sum(), [x, *weights.values()])
    for name, a, b in zip(["x", *weights], mine, truth):
        assert a.isfinite().all() and a.any(), name
        near(a, b, scale=5)


@every_kind
def test_the_definition_goes_on_from_its_state(kind):
    made, x = built(kind, BASE.get(kind, {})), inputs(4, 10)
    naive = import_module(f"{get(kind).package}.naive").naive
    weights = {n: t.detach() for n, t in made.state_dict().items()}
    more = taken(made, x)
    whole, _ = naive(weights, made.f, made.dims, x, ragged(), **more)
    state, parts = None, []
    for a, b in ((0, 3), (3, 4), (4, 10)):
        part = {name: t[:, a:b] for name, t in more.items()}
        y, state = naive(weights, made.f, made.dims, x[:, a:b], part_of(ragged(), a, b), state, **part)
        parts.append(y)
    near(torch.cat(parts, 1)[REAL], whole[REAL])


@every_form
def test_steps_equal_the_whole(kind, given):
    made, x = built(kind, given), inputs(2, 10)
    near(chunks(made, x, Tokens.plain(2, 10), tuple(range(1, 10))), made(x, Tokens.plain(2, 10)))


@every_form
def test_chunks_equal_the_whole(kind, given):
    made, x = built(kind, given), inputs(2, 11)
    near(chunks(made, x, Tokens.plain(2, 11), (4, 5, 7)), made(x, Tokens.plain(2, 11)))


@every_form
def test_ragged_rows_in_chunks_equal_the_whole(kind, given):
    made, x = built(kind, given), inputs(4, 10)
    whole = made(x, ragged())
    for cuts in ((5,), (1, 2, 3, 4, 6), (2, 3, 8)):
        near(chunks(made, x, ragged(), cuts)[REAL], whole[REAL])


@every_form
def test_packed_equals_separate(kind, given):
    made, x = built(kind, given), inputs(2, 11)
    documents = [(0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 9), (1, 9, 11)]
    segments = torch.tensor([[0] * 4 + [1] + [2] * 6, [5] * 9 + [7] * 2])
    packed = made(x, Tokens.packed(segments))
    for row, a, b in documents:
        near(packed[row, a:b], made(x[row : row + 1, a:b], Tokens.plain(1, b - a))[0])


@every_form
def test_padded_equals_unpadded(kind, given):
    """Prompts of 5, 3 and 4 tokens padded to 5 on either side, then 3 tokens more without padding."""
    made, x = built(kind, given), inputs(3, 8)
    for sides in ("left", "right"):
        valid = torch.ones(3, 5, dtype=torch.bool)
        for row, missing in ((1, 2), (2, 1)):
            valid[row, slice(0, missing) if sides == "left" else slice(5 - missing, 5)] = False
        state = made.init_state(3, dtype=torch.float32)
        y = made(x[:, :5], Tokens.padded(valid), state)
        assert y.isfinite().all()
        lengths = valid.sum(1)
        more = torch.cat(
            [made(x[:, 5 + i : 6 + i], Tokens((lengths + i)[:, None]), state) for i in range(3)], 1
        )
        for row in range(3):
            own = torch.cat((x[row, :5][valid[row]], x[row, 5:]))[None]
            alone = made(own, Tokens.plain(1, own.shape[1]))[0]
            near(torch.cat((y[row][valid[row]], more[row])), alone)


@every_kind
def test_bfloat16_is_near_float32(kind):
    made = built(kind, BASE.get(kind, {}))
    narrow = get(kind).module()(made.f, made.dims, dtype=torch.bfloat16)
    narrow.load_state_dict(made.state_dict())
    made.load_state_dict(narrow.state_dict())
    x = inputs(4, 10).bfloat16()
    truth, y = made(x.float(), ragged()), fed(narrow)(x, ragged())
    assert y.dtype == torch.bfloat16
    assert (y.float() - truth)[REAL].norm() < 0.03 * truth[REAL].norm()


@every_kind
def test_slots_have_definitions_that_are_called(kind):
    """What REFERENCE names is a declared slot, and the layer reaches it through `parts`."""
    cls = get(kind).module()
    assert cls.REFERENCE and cls.REFERENCE.keys() <= {slot.name for slot in get(kind).slots}
    called = set()

    def spy(name, function):
        return lambda *args, **more: called.add(name) or function(*args, **more)

    f = values(kind, d_model=DIMS.d_model, **BASE.get(kind, {}))
    spied = cls(f, DIMS, parts={name: spy(name, function) for name, function in cls.REFERENCE.items()})
    spied.load_state_dict(built(kind, BASE.get(kind, {})).state_dict())
    spied = fed(spied)
    state = spied.init_state(2, dtype=torch.float32)
    spied(inputs(2, 5), Tokens.plain(2, 5), state)
    spied(inputs(2, 1), Tokens.plain(2, 1, start=5), state)
    assert called == cls.REFERENCE.keys()


def test_tables_need_no_torch():
    code = (
        "import sys; from mambadsl.kinds import registry, sublayer; registry.all_kinds();"
        "print(sorted({'torch', 'numpy', 'networkx', 'lark'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
