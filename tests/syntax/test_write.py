"""The formatter: pairs of files (format/NAME.in.mdl, NAME.out.mdl), and trees built in Python."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from mambadsl.syntax import build, tree
from mambadsl.syntax.read import read
from mambadsl.syntax.write import WIDTH, write
from mambadsl.text import source
from mambadsl.text.source import from_text

PAIRS = sorted((Path(__file__).parent / "format").glob("*.in.mdl"))


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.name)
def test_a_file_is_formatted_as_its_pair(path, request):
    text = write(read(source.read(path)))
    expected = path.with_name(path.name.replace(".in.", ".out."))
    if request.config.getoption("--renew"):
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8")
    assert write(read(from_text(text))) == text


def test_there_are_pairs():
    assert len(PAIRS) >= 4


FILE = build.file(
    [
        build.model(
            "m", {"d_model": 4096, "norm": build.word("rmsnorm", {"eps": 1e-5}), "rope": None, "tie": True}
        ),
        build.let("window", Fraction(1, 3)),
        build.layer("M", build.word("mamba2", {"heads": 128, "scale": -0.5})),
        build.layer(
            "A", build.word("attention", {f"field_{i}": [i, "word", build.string("text")] for i in range(9)})
        ),
        build.layer("S", build.use("A", {"window": 1.5}), shared=True),
        build.stack(
            [build.repeat(build.group([build.use("M"), build.use("A")]), 3), build.cut()]
            + [build.parallel([build.use("M"), build.use("A")])] * 40
        ),
        build.mtp([build.use("M")], {"depths": 2}),
        build.expect(build.word("layers"), "==", 52),
    ],
    comments=["made by a test", ""],
)


def test_a_built_file_reads_back_and_is_laid_out(golden):
    text = write(FILE)
    assert read(from_text(text)) == FILE
    assert write(read(from_text(text))) == text
    assert all(len(line) <= WIDTH for line in text.splitlines())
    golden("built_file.mdl", text)


def test_a_built_pattern_is_wrapped_at_the_width():
    items = [build.use("M")] * 200 + [build.group([build.use("A")] * 100)]
    file = tree.File(source=build.NOWHERE.source, pattern=build.pattern(items))
    text = write(file)
    assert read(from_text(text)) == file and max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "number, text",
    [
        (4096, "4096"), (0, "0"), (1e-5, "1e-5"), (4.0, "4"), (-3, "-3"), (0.1, "0.1"),
        (Fraction(1, 8), "0.125"),
        (Fraction(2, 3), "2 / 3"), (Fraction(-2, 3), "-(2 / 3)"), (2**53, "9007199254740992"), (1e20, "1e20"),
        (Fraction(1, 10**7), "1e-7"),
    ],
)  # fmt: skip
def test_numbers_are_exact(number, text):
    out = write(build.file([build.let("x", number)]))
    assert out == f"let x = {text}\n"
    value = read(from_text(out)).statements[0].value
    exact = Fraction(repr(number)) if isinstance(number, float) else Fraction(number)
    assert evaluated(value) == exact


def evaluated(node: tree.Value) -> Fraction:
    match node:
        case tree.Number(value=value):
            return value
        case tree.Negative(value=value):
            return -evaluated(value)
        case tree.Paren(value=value):
            return evaluated(value)
        case tree.Binary(op="/", left=left, right=right):
            return evaluated(left) / evaluated(right)
        case tree.Binary(op="-", left=left, right=right):
            return evaluated(left) - evaluated(right)


def test_a_tree_without_parentheses_keeps_its_meaning():
    inner = tree.Binary(span=build.NOWHERE, op="-", left=build.number(2), right=build.number(1))
    outer = tree.Binary(span=build.NOWHERE, op="-", left=build.number(5), right=inner)
    text = write(build.file([build.let("x", outer)]))
    assert text == "let x = 5 - (2 - 1)\n"
    assert evaluated(read(from_text(text)).statements[0].value) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2**53 + 1, 10**30, Fraction(1, 10**400)])
def test_numbers_that_the_language_cannot_hold_are_refused(bad):
    with pytest.raises(ValueError):
        build.number(bad)


def test_values_that_the_language_cannot_hold_are_refused():
    with pytest.raises(TypeError):
        build.value({"a": 1})
    with pytest.raises(ValueError):
        build.string('say "x"')


def test_an_empty_body_stays_on_one_line():
    assert write(read(from_text("model m {\n\n}"))) == "model m {}\n"


def test_a_very_long_file_is_written_in_good_time():
    text = "# c\nM " * 9_000
    assert write(read(from_text(text))).count("# c") == 9_000
