"""Random model files that mean something: every kind with fields of the right types, changed copies, sums,
blocks, shared items with adapters, cuts, tails, parts. And nearly the same files with something wrong.

`Author(random).file()` is valid text; `spoiled(random, text)` mostly still parses.
"""

from __future__ import annotations

import re
from random import Random

from mambadsl.kinds.fields import Field, Flag, Int, Items, OneForm, OneOf, OrWord, Real, Type
from mambadsl.kinds.registry import all_kinds
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.spec.model import MODEL_FIELDS

NAMES = ("M", "A", "F", "E", "S", "W", "Local", "B2", "X_1")
NUMBERS = ("1", "2", "3", "8", "16", "64", "0.5", "1e-5", "1_000", "0.1", "1.25", "1e6")


class Author:
    """One file. All choices come from `random`; most: items of a row, declared layers."""

    def __init__(self, random: Random, *, most: int = 5):
        self.random, self.most = random, most
        self.lets: list[str] = []
        #: Declared names: of single layers by kind, of sums, of blocks, of shared items.
        self.single: dict[str, str] = {}
        self.sums: list[str] = []
        self.blocks: list[str] = []
        self.shared: list[str] = []

    def often(self, share: float) -> bool:
        return self.random.random() < share

    def some(self, items, most: int) -> list:
        items = list(items)
        return self.random.sample(items, self.random.randint(0, min(most, len(items))))

    # -- values

    def whole(self, low: int, high: int) -> str:
        number = self.random.choice(
            [v for v in (1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 100) if low <= v <= high] or [low]
        )
        match self.random.randrange(8):
            case 0:
                return f"{2 * number} // 2"
            case 1:
                return f"max({number}, {low})"
            case 2 if self.lets:
                return f"({number} + 0 * {self.random.choice(self.lets)})"
            case 3 if low <= 64:
                return f"round_up({number}, {max(low, 1)})"
        return str(number)

    def real(self, type: Real) -> str:
        low = type.low if type.low is not None else type.above if type.above is not None else -2
        high = type.high if type.high is not None else low + 4
        number = round(self.random.uniform(low, high), self.random.randint(1, 16))
        if not low < number < high:
            number = low + (high - low) / 4
        return repr(number).replace("e-0", "e-")

    def value(self, type: Type) -> str:
        match type:
            case Int():
                return self.whole(type.low, min(type.high, 100))
            case Real():
                return self.real(type)
            case Flag():
                return self.random.choice(["true", "false"])
            case OneOf():
                return self.random.choice(type.words)
            case OrWord():
                return type.word if self.often(0.3) else self.value(type.type)
            case Items():
                return f"[{', '.join(self.value(type.type) for _ in range(type.length or 2))}]"
            case OneForm():
                name = self.random.choice(list(type.forms))
                args = self.args(type.forms[name])
                return f"{name}({args})" if args or self.often(0.2) else name
        raise TypeError(type)

    def args(self, fields: tuple[Field, ...], most: int = 4) -> str:
        return ", ".join(f"{f.name}={self.value(f.type)}" for f in self.some(fields, most))

    # -- patterns

    def sublayer(self) -> str:
        return self.args(SUBLAYER_FIELDS, 2)

    def kind(self, sublayer: bool = True) -> tuple[str, str]:
        """(kind, text)"""
        kind = self.random.choice(all_kinds())
        groups = [self.args(kind.fields), self.args([f for f in BRANCH_FIELDS if f.name != "adapter"], 2)]
        groups += [self.sublayer()] if sublayer and self.often(0.3) else []
        return kind.name, f"{kind.name}({', '.join(filter(None, groups))})"

    def changed(self, name: str) -> str:
        kind = next(k for k in all_kinds() if k.name == self.single[name])
        args = self.args(kind.fields, 3)
        return f"{name}({args})" if args else name

    def unit(self) -> str:
        names = [*self.single, *self.sums, *self.blocks, *self.shared]
        match self.random.randrange(8):
            case 0 if self.single:
                return self.changed(self.random.choice(list(self.single)))
            case 1 if self.shared:
                rank = self.random.choice([2, 4])
                return f"{self.random.choice(self.shared)}(adapter=lora(rank={rank}))"
            case 2:
                return self.kind()[1]
        return self.random.choice(names) if names else self.kind()[1]

    def sum(self) -> str:
        """Branches without fields of the sublayer, which must agree."""
        plain = [self.kind(sublayer=False)[1] for _ in range(self.random.randint(2, 3))]
        return "+".join(plain)

    def row(self, *, depth: int, cuts: bool, shared: bool = True) -> str:
        out = []
        kept = self.shared if shared else []
        before, self.shared = self.shared, kept
        for _ in range(self.random.randint(1, self.most)):
            match self.random.randrange(6):
                case 0 if depth:
                    inner = self.row(depth=depth - 1, cuts=False, shared=shared)
                    out.append(f"[{inner}]*{self.random.randint(1, 3)}")
                case 1:
                    out.append(f"{self.unit()}*{self.random.randint(1, 4)}")
                case 2:
                    out.append(self.sum())
                case _:
                    out.append(self.unit())
            if cuts and self.often(0.15):
                out.append("|")
        self.shared = before
        return " ".join(out)

    # -- statements

    def declarations(self) -> list[str]:
        lines = []
        for name in self.some(NAMES, self.most):
            match self.random.randrange(7):
                case 0:
                    self.sums.append(name)
                    lines.append(f"layer {name} = {self.sum()}")
                case 1:
                    lines.append(f"layer {name} = [{self.row(depth=1, cuts=False)}]")
                    self.blocks.append(name)
                case 2:
                    # Blocks may hold shared items, and a shared item holds no other.
                    blocks, self.blocks = self.blocks, []
                    inner = self.row(depth=1, cuts=False, shared=False)
                    self.blocks = blocks
                    lines.append(f"shared {name} = [{inner}]")
                    self.shared.append(name)
                case 3:
                    lines.append(f"shared {name} = {self.kind()[1]}")
                    self.shared.append(name)
                case 4 if self.single:
                    base = self.random.choice(list(self.single))
                    lines.append(f"layer {name} = {self.changed(base)}")
                    self.single[name] = self.single[base]
                case _:
                    self.single[name], text = self.kind()
                    lines.append(f"layer {name} = {text}")
        return lines

    def file(self) -> str:
        """A valid file."""
        lines = []
        settings = [f for f in self.some(MODEL_FIELDS, 5) if f.name != "d_model"]
        if self.often(0.8):
            inner = "\n".join(f"  {f.name} = {self.value(f.type)}" for f in settings)
            lines.append(f"model random_{self.random.randint(0, 9)} {{\n  d_model = 64\n{inner}\n}}")
        for name in self.some(("wide", "deep", "third"), 2):
            lines.append(f"let {name} = {self.whole(1, 100)}")
            self.lets.append(name)
        lines += self.declarations()
        lead = "| " if self.often(0.1) else ""
        stack = f"stack {{ {lead}{self.row(depth=2, cuts=True)} }}"
        lines.append(stack)
        if self.often(0.25):
            settings = (
                f"(depths={self.random.randint(1, 2)}, weights={self.random.choice(['own', 'shared'])})"
            )
            lines.append(f"mtp{settings} {{ {self.row(depth=1, cuts=False)} }}")
        if self.often(0.25):
            lines.append(self.parts(stack))
        if self.often(0.5):
            lines.append("expect layers >= 1")
        return "\n".join(lines) + "\n"

    def parts(self, stack: str) -> str:
        slots = {
            f"{k.name}.{s.name}": self.random.choice(["a.fast", "mine"]) for k in all_kinds() for s in k.slots
        }
        for name, kind in self.single.items():
            if re.search(rf"\b{name}\b", stack):
                slots |= {f"{name}.{s.name}": "own" for k in all_kinds() if k.name == kind for s in k.slots}
        numbers = ("2", "1 / 3", "[1, none]", '"text"', "word", "call(a=2, b=[1e-30])", "1e300")
        lines = [f"  {slot} = {slots[slot]}(x={self.random.choice(numbers)})" for slot in self.some(slots, 3)]
        return "\n".join([f"parts mine : {self.random.choice(['reference', 'fused'])} {{", *lines, "}"])


_TOKEN = re.compile(r'"[^"\n]*"|[A-Za-z_][A-Za-z0-9_]*|[0-9][0-9_.e]*(?:e-?\d+)?|[^\s\w]|\s+')
_WORDS = (
    "heads kv_heads head_dim d_state d_model d_ff window rope norm none layernorm rmsnorm adapter lora vocab "
    "context relu2 silu depths shared own experts top_k dropout act mamba2 attention mlp moe mamba3 reference "
    "fused scan core"
).split()
_VALUES = (
    "0",
    "-1",
    "1 / 3",
    "1 / 0",
    "1e300",
    "9007199254740992",
    "none",
    "[1]",
    "[]",
    '"text"',
    "true",
    "M",
    "M(heads=2)",
    "rope(theta=0)",
    "rope(x=1)",
    "min()",
    "round_up(1, 0)",
    "d_model",
    "d_model * d_model * d_model * d_model",
    "1e-308",
)
_STATEMENTS = (
    "stack { M }",
    "stack { | }",
    "mtp { M | M }",
    "model again { vocab = 3 }",
    "let wide = wide",
    "layer M = M",
    "|",
    'from "std/tiny.mdl" import M',
    'from "nowhere.mdl" import Q, q',
    "layer Q = [Q Q]",
    "shared A = [A | A]",
    "parts mine : mine { }",
    "expect layers == 0",
    "expect layrs > 1",
    "expect count(M) / 0 == 1",
    "let d_model = 7",
    "layer L = [[[M*9999]*9999]*9999]",
    "layer K = [M F](window=3)",
    "shared T = attention() stack { T(heads=3) T+M }",
    "let a = b let b = a",
    "layer V = U layer U = [V M]",
    "parts p { Q.scan = x M.nope = y scan = z mamba2.scan = a(1) }",
)


def spoiled(random: Random, text: str) -> str:
    """The text with one to three things changed; four times in five the grammar does not mind."""
    for _ in range(random.randint(1, 3)):
        tokens = _TOKEN.findall(text)
        if random.random() < 0.25:
            text += "\n" + random.choice(_STATEMENTS)
            continue
        at = random.randrange(len(tokens))
        if random.random() < 0.1:
            tokens[at : at + random.randrange(2)] = random.choice(
                [[], [random.choice(tokens)], list("+*|=,[]")]
            )
        else:
            while not tokens[at][0].isalnum():
                at = random.randrange(len(tokens))
            tokens[at] = _other(random, tokens[at], tokens)
        text = "".join(tokens)
    return text


def _other(random: Random, token: str, tokens: list[str]) -> str:
    """Another number, layer or word."""
    if token[0].isdigit():
        return random.choice(_VALUES)
    if token[0].isupper():
        return random.choice([*NAMES, "Unknown"])
    if token in ("layer", "shared"):
        return random.choice(["layer", "shared"])
    if token in ("stack", "model", "mtp", "parts", "let", "expect", "from", "import"):
        return token
    return random.choice([*_WORDS, *(t for t in tokens if t[0].islower() and len(t) > 3)])
