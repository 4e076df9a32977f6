"""Exact pictures of diagnostics."""

from __future__ import annotations

import json
import re

import pytest

from mambadsl.text.diagnostic import Code, Diagnostic, Label, MdlError
from mambadsl.text.render import to_github, to_json, to_text
from mambadsl.text.source import Source, Span

RULE = Code("E299", "a rule for this test", "...")


def at(source: Source, words: str, nth: int = 1) -> Span:
    start = -1
    for _ in range(nth):
        start = source.text.index(words, start + 1)
    return Span(source, start, start + len(words))


LONG = Source("long.mdl", "# one\n" * 13 + "layer W = A(window=window, kv_heads=12)\n")
BASE = Source(
    "nemotron_h_8b.mdl", "\n" * 11 + "layer A = attention(heads=32, kv_heads=8, head_dim=128, rope=none)\n"
)
HEADS = Diagnostic(
    RULE,
    "`heads` must be a multiple of `kv_heads`",
    at(LONG, "kv_heads=12"),
    "32 heads cannot be shared by 12",
    labels=(Label(at(LONG, "window=window"), ""), Label(at(BASE, "heads=32"), "heads set here")),
    notes=("used 6 times: Local (line 15) in stack lines 19-22",),
    help=("1, 2, 4, 8, 16 and 32 divide 32",),
)


def test_two_files_and_two_places_in_one_line():
    assert (
        to_text(HEADS)
        == """\
error[E299]: `heads` must be a multiple of `kv_heads`
  --> long.mdl:14:28
   |
14 | layer W = A(window=window, kv_heads=12)
   |             -------------  ^^^^^^^^^^^ 32 heads cannot be shared by 12
  ::: nemotron_h_8b.mdl:12:21
12 | layer A = attention(heads=32, kv_heads=8, head_dim=128, rope=none)
   |                     -------- heads set here
   = used 6 times: Local (line 15) in stack lines 19-22
   = help: 1, 2, 4, 8, 16 and 32 divide 32"""
    )


def picture(text: str, span: tuple[int, int], label: str = "", labels=()) -> list[str]:
    source = Source("f.mdl", text)
    seconds = tuple(Label(Span(source, *place), words) for place, words in labels)
    return to_text(Diagnostic(RULE, "no", Span(source, *span), label, seconds)).split("\n")[1:]


def test_labels_that_do_not_fit_behind_their_mark_go_below_it():
    assert picture("M A F E", (0, 1), "here", [((2, 3), "second"), ((6, 7), "third")]) == [
        " --> f.mdl:1:1",
        "  |",
        "1 | M A F E",
        "  | ^ -   - third",
        "  |   second",
        "  | here",
    ]


def test_lines_between_are_left_out():
    assert picture("a\nb\nc\nd\n", (6, 7), "last", [((0, 1), "first"), ((2, 3), "next")]) == [
        " --> f.mdl:4:1",
        "  |",
        "1 | a",
        "  | - first",
        "2 | b",
        "  | - next",
        "...",
        "4 | d",
        "  | ^ last",
    ]


def test_tabs_and_wide_and_combining_characters_keep_the_caret_below():
    columns_before = 4 + len("M") + 4 + 2 * 2 + 1 + 1 + 1  # tab M tab, two wide, blank, e with accent, blank
    assert picture("\tM\t漢字 e\u0301 A", (9, 10))[2:] == [
        "1 |     M    漢字 e\u0301 A",
        "  | " + " " * columns_before + "^",
    ]


def test_the_end_of_a_line_and_an_empty_file_have_a_caret():
    assert picture("M A\n", (3, 3))[2:] == ["1 | M A", "  |    ^"]
    assert picture("", (0, 0))[2:] == ["1 |", "  | ^"]


def test_a_span_over_lines_is_marked_in_its_first():
    assert picture("stack {\n  M\n}", (0, 13))[2:] == ["1 | stack {", "  | ^^^^^^^"]


@pytest.mark.parametrize("place", [0, 5, 60, 4_000, 9_998])
def test_a_long_line_is_cut_around_the_caret(place):
    text = "".join(chr(97 + i % 26) for i in range(9_999))
    _, _, shown, marks = picture(text, (place, place + 1), "x" * 8)
    assert len(shown) <= 130
    assert shown[marks.index("^")] == text[place]
    assert "..." in shown


def test_marks_outside_a_cut_line_stay_inside_the_picture():
    lines = picture(
        "M " * 5_000, (5_000, 5_001), "here", [((0, 1), "far left"), ((9_000, 9_001), "far right")]
    )
    assert all(len(line) < 150 for line in lines)
    assert sum("far" in line for line in lines) == 2


def test_control_characters_do_not_reach_the_terminal():
    text = "let x = \x1b[31m\u202e\u200bM"
    rendered = "\n".join(picture(text, (8, 9), "\x1b[0m"))
    assert not re.search("[\x1b\u202e\u200b]", rendered)


def test_without_a_place():
    problem = Diagnostic(RULE, "there is no file `x`", notes=("a note",), help=("did you mean `y`?",))
    assert to_text(problem) == "error[E299]: there is no file `x`\n  = a note\n  = help: did you mean `y`?"


def test_color_adds_codes_and_nothing_else():
    assert re.sub("\033\\[[0-9;]*m", "", to_text(HEADS, color=True)) == to_text(HEADS)
    assert "\033[1;31merror[E299]" in to_text(HEADS, color=True)


def test_json_is_plain_data():
    data = to_json(HEADS)
    assert json.loads(json.dumps(data)) == data
    assert data["code"] == "E299" and data["severity"] == "error"
    assert (data["file"], data["line"], data["column"]) == ("long.mdl", 14, 28)
    assert (data["end_line"], data["end_column"]) == (14, 39)
    assert data["labels"][1] == {
        "file": "nemotron_h_8b.mdl", "line": 12, "column": 21, "end_line": 12, "end_column": 29,
        "text": "heads set here",
    }  # fmt: skip
    assert to_json(Diagnostic(RULE, "no"))["line"] is None


def test_github_annotation():
    source = Source("dir,1/a:b.mdl", "M\nM A\n")
    problem = Diagnostic(RULE, "100% wrong\nhere", at(source, "A"), "label", help=("do: this",))
    assert to_github(problem) == (
        "::error file=dir%2C1/a%3Ab.mdl,line=2,col=3,endLine=2,endColumn=3,title=E299"
        "::100%25 wrong%0Ahere%0Alabel%0Ahelp: do: this"
    )
    warning = Diagnostic(Code("W299", "t", "s"), "careful")
    assert to_github(warning) == "::warning title=W299::careful"
    assert to_github(Diagnostic(Code("I299", "t", "s"), "fyi")).startswith("::notice ")


def test_an_error_prints_all_its_diagnostics():
    error = MdlError([HEADS, Diagnostic(RULE, "second")])
    assert str(error) == to_text(HEADS) + "\nerror[E299]: second"
