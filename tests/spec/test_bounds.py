"""No input takes long: chains of any length, doubling blocks, huge repeats, many names, many errors."""

from __future__ import annotations

import time

import pytest

from mambadsl.graph.unroll import unroll
from mambadsl.spec.codes import MAX_DEPTH
from mambadsl.spec.expand import expand
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text

pytestmark = pytest.mark.usefixtures("frozen_heap")
#: CPU seconds of a stage. Measured on a slow machine: nearly all below 0.5, none above 1.1, but for one that took 1.6
#: late in a long run of all tests.
LIMIT = 2.5


def doubling(n: int, first: str = "layer B0 = [M F]") -> str:
    return first + "".join(f"\nlayer B{i} = [B{i - 1} B{i - 1}]" for i in range(1, n)) + "\n"


def nested(expression: str, depth: int) -> str:
    return "(" * depth + expression + ")" * depth


def long_lets(n: int) -> str:
    lines = ["let a0 = 1"] + [f"let a{i} = {nested(f'a{i - 1}', 50)} + 0" for i in range(1, n)]
    return "\n".join(reversed(lines)) + f"\nlayer F = mlp(d_ff=a{n - 1})\nstack {{ F }}"


def long_layers(n: int) -> str:
    lines = ["layer L0 = mlp(d_ff=8)"] + [f"layer L{i} = {'[' * 50}L{i - 1}{']' * 50}" for i in range(1, n)]
    return "\n".join(reversed(lines)) + f"\nstack {{ L{n - 1} }}"


FINE = {
    "a chain of 250 constants": long_lets(250),
    "a chain of 250 layers": long_layers(250),
    "a chain of 2000 constants": "\n".join(f"let a{i} = a{i + 1}" for i in range(2000))
    + "\nlet a2000 = 1\nstack { M }",
    "a chain of 2000 copies": "".join(f"layer L{i} = L{i + 1}(window=4)\n" for i in range(1000))
    + "layer L1000 = A\nstack { L0 }",
    "doubling to 8192 layers": doubling(13) + "stack { B12 }",
    "10,000 layers": "stack { [M F]*5000 }",
    "a row of 10,000 layers": f"stack {{ {'M F ' * 5000} }}",
    "shared blocks changed again and again": doubling(13)
    + "shared S = B12\n"
    + "".join(f"layer X{i} = S(adapter=lora(rank=2))\n" for i in range(500))
    + "stack { M }",
    "many layers": "".join(f"layer L{i} = mlp(d_ff={i + 1})\n" for i in range(3000)) + "stack { L1 }",
    "a prime width": "model m { d_model = 1_099_511_627_689 } layer A = attention() stack { A }",
}
REFUSED = {
    "E047": doubling(20) + "stack { M }",
    "E047 repeats": "[[[M*9999]*9999]*9999]",
    "E047 repeats by name": "".join(f"layer L{i} = L{i + 1}*9999\n" for i in range(500))
    + "layer L500 = M stack { M }",
    "E047 a huge number": "M*9007199254740992",
    "E047 depth": "layer L0 = [M F]*2"
    + "".join(f"\nlayer L{i} = [L{i - 1} |]" for i in range(1, 99))
    + "\nstack { M }",
    "E025 constants": "\n".join(f"let a{i} = a{(i + 1) % 2000}" for i in range(2000)) + "\nstack { M }",
    "E025 layers": "\n".join(f"layer L{i} = [L{(i + 1) % 2000} M]" for i in range(2000)) + "\nstack { M }",
    "E025 many circles": "".join(f"layer X{i} = [Y{i}] layer Y{i} = X{i}\n" for i in range(1500))
    + "stack { M }",
    "E020 many": "".join(f"layer Lo_ng_name{i} = M\n" for i in range(4000))
    + "stack { "
    + " ".join(f"Lo_ng_nema{i}" for i in range(4000))
    + " }",
    "E020 long": f"stack {{ {'M' * 200_000} }}",
    "E020 long and legal": "".join(f"layer {'M' * i} = M\n" for i in range(2, 400))
    + f"stack {{ {'M' * 60_001} }}",
    "E022 many": "layer M = mamba2(" + ", ".join(f"headz{i}=1" for i in range(9000)) + ") stack { M }",
    "E024": "let a = 1\n" * 9000 + "stack { M }",
    "E041": "let a = 1e29" + "".join(f" let a{i} = a * a" for i in range(3000)) + " stack { M }",
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_large_and_fine_takes_no_time(name):
    file = read(from_text(FINE[name]))
    start = time.thread_time()
    graph = unroll(resolve(file))
    assert time.thread_time() - start < LIMIT
    assert graph.layers


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_is_refused_at_once(name):
    file = read(from_text(REFUSED[name]))
    start = time.thread_time()
    with pytest.raises(MdlError) as caught:
        unroll(resolve(file))
    assert time.thread_time() - start < LIMIT
    found = caught.value.diagnostics
    assert found[0].code.id == name[:4] and len(found) <= 50
    start = time.thread_time()
    assert len(str(caught.value)) < 100_000
    assert time.thread_time() - start < LIMIT


def test_the_famous_one_is_one_clear_error():
    with pytest.raises(MdlError) as caught:
        resolve(read(from_text("[[[M*9999]*9999]*9999]")))
    (found,) = caught.value.diagnostics
    assert found.message == "this lays out 99,980,001 layers; a model has at most 10,000"


def test_blocks_as_deep_as_they_may_be_can_be_written_and_read():
    lines = ["layer L0 = [M F]*2"] + [f"layer L{i} = [L{i - 1} M]" for i in range(1, MAX_DEPTH - 2)]
    text = "\n".join(lines) + f"\nstack {{ L{MAX_DEPTH - 3} }}"
    spec = resolve(read(from_text(text)))
    again = expand(spec)
    assert unroll(resolve(read(from_text(again)))) == unroll(spec)
