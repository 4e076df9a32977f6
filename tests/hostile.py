"""Everything that somebody could send to hang or crash the compiler, in one place. Texts by name, and files.

`python tests/hostile.py` runs all texts and prints, in JSON, the seconds of each (CPU) and the peak memory.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path

#: Levels; the largest value of whole-number fields; primes below it.
DEEP, BIG, PRIME, OTHER_PRIME = 100_000, 2**40, 1_099_511_627_689, 1_099_511_627_609


def _lines(line: str, n: int) -> str:
    return "".join(line.format(i=i, j=i + 1) for i in range(n))


TEXTS = {
    "nothing": "",
    "NUL": "M\0 A",
    "only NUL": "\0" * 1000,
    "BOM": "\ufeffM A",
    "two BOMs": "\ufeff\ufeffM",
    "CRLF": "model m {\r\n  d_model = 64\r\n}\r\nstack { M }\r\n",
    "CR": "stack { M }\rexpect layers == 1\r",
    "bidi": "stack { M \u202e A }",
    "surrogates as text": "stack { \ud800 }",
    "astral": "\U0001f600" * 1000,
    "a megabyte on one line": "M " * 500_000,
    "a long line": "M " * 19_000,
    "a long name": "M" * 250_000,
    "a long word": "stack { " + "m" * 200_000 + "() }",
    "a long string": f'from "{"x" * 200_000}" import M stack {{ M }}',
    "a long comment": "M #" + "x" * 200_000,
    "a long number": "let x = " + "9" * 200_000,
    "exponents": "let x = 1e308 * 1e308 let y = 1e-308 let z = y * y stack { M }",
    "huge fields": f"layer A = attention(heads={BIG}, head_dim={BIG}, window={BIG}) stack {{ A*9 }}",
    "huge width": f"model m {{ d_model = {BIG} vocab = {BIG} context = {BIG} }}"
    " stack { attention() M F E }",
    "a prime width": f"model m {{ d_model = {PRIME} }} stack {{ attention() mamba2() mlp() moe() mamba1() }}",
    "prime heads": f"stack {{ A(heads={PRIME}, kv_heads={OTHER_PRIME}, head_dim=1)"
    f" M(heads={PRIME}, groups=7) }}",
    "many experts": f"stack {{ moe(experts={BIG}, top_k={BIG}) }}",
    "repeats": "[[[M*9999]*9999]*9999]",
    "one repeat": "M*9007199254740992",
    "nothing at all": "M*0",
    "ten thousand layers": "stack { [M F A E S]*2000 }",
    "cuts": "stack { " + "M | " * 9999 + "}",
    "two cuts ten thousand times": "stack { [M | | M]*4000 }",
    "sums": "stack { " + "+".join(["M"] * 5000) + " }",
    "sums of sums": "layer B0 = M" + _lines("\nlayer B{j} = B{i}+B{i}", 60) + "\nstack { B60 }",
    "brackets": "[" * DEEP,
    "brackets closed": "[" * DEEP + "M" + "]" * DEEP,
    "parentheses": "let x = " + "(" * DEEP,
    "calls": "let x = " + "f(a=" * 30_000,
    "minus": "let x = " + "-" * DEEP + "1",
    "plus": "let x = " + "1+" * DEEP + "1",
    "doubling": "layer B0 = [M F]" + _lines("\nlayer B{j} = [B{i} B{i}]", 60) + "\nstack { B60 }",
    "doubling in shared": "shared S = M"
    + _lines("\nlayer S{i}_ = S", 1)
    + _lines("\nlayer B{j} = [S S{i}_]", 60)
    + "\nstack { M }",
    "nested lists": "let x0 = 1"
    + _lines("\nlet x{j} = [x{i}, x{i}, x{i}, x{i}]", 60)
    + "\nstack { mlp(d_ff=x60) }",
    "nested forms": "let x0 = 1" + _lines("\nlet x{j} = f(a=x{i}, b=x{i})", 60) + "\nstack { A(rope=x60) }",
    "long chain of constants": _lines("let a{i} = a{j}\n", 9000) + "let a9000 = 1 stack { M }",
    "circle of constants": _lines("let a{i} = a{j}\n", 9000) + "let a9000 = a0 stack { M }",
    "circle of layers": _lines("layer L{i} = [L{j} M]\n", 5000) + "layer L5000 = L0 stack { L9 }",
    "settings in a circle": "model m { d_model = vocab vocab = context context = d_model } stack { M F A E }",
    "many statements": "stack { M }\n" * 10_000,
    "many models": "model m {}\n" * 9_999,
    "many lets": "let a = 1\n" * 9_999,
    "many parts": _lines("parts p{i} : p{j} {{}}\n", 6000) + "stack { M }",
    "many unknown layers": "stack { " + _lines("Q{i} ", 9000) + " }",
    "many unknown fields": "stack { M(" + _lines("q{i}=1, ", 9000) + ") }",
    "many unknown settings": "model m { " + _lines("q{i}=1 ", 9000) + " } stack { M }",
    "many unknown facts": "stack { M } " + _lines("expect q{i} == 1\n", 8000),
    "many wrong facts": "stack { M } " + "expect params == 1\n" * 7000,
    "many unused": _lines("layer L{i} = mlp(d_ff={j})\n", 3000) + "stack { M }",
    "many distinct layers": "stack { " + _lines("mlp(d_ff={j}) ", 4000) + "}",
    "many broken layers": "stack { " + _lines("A(heads=3, kv_heads=2, window={j}) ", 2000) + "}",
    "import of itself by name": 'from "fuzz.mdl" import M stack { M }',
    "import of nothing": 'from "" import M stack { M }',
    "imports up": 'from "std/../../../../../../etc/passwd" import M stack { M }',
    "import of a device": 'from "/dev/zero" import M stack { M }',
    "imports": 'from "std/std.mdl" import M\n' * 4000 + "stack { M }",
    "junk": "@" * 200_000,
    "quotes": '"' * 200_000,
    "stars": "M" + "*2" * 50_000,
    "colons": "a:b" * 60_000,
    "keywords": "layer stack model let " * 9_000,
    "tabs": "\t" * 200_000 + "M",
    "blank lines": "\n" * 200_000 + "M",
}


def main() -> None:
    from front import front

    seconds = {}
    for name, text in TEXTS.items():
        start = time.process_time()
        stage, found = front(text)
        seconds[name] = (stage, len(found), time.process_time() - start)
    print(json.dumps({"seconds": seconds, "kib": peak_kib()}))


def peak_kib() -> int:
    """The most memory that this program has had. (`ru_maxrss` alone counts what the process that started it
    had at that moment, too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


if __name__ == "__main__":
    main()
