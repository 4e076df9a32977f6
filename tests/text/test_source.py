"""Files and strings into Sources, and what is refused."""

from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import MAX_BYTES, Source, Span, from_text, read


def refused(path) -> str:
    with pytest.raises(MdlError) as caught:
        read(path)
    (problem,) = caught.value.diagnostics
    return f"{problem.code.id} {problem.message} {' '.join(problem.help)}"


def test_line_ends_and_the_byte_order_mark_are_normalised(tmp_path):
    path = tmp_path / "a.mdl"
    path.write_bytes(b"\xef\xbb\xbfM\r\nA\rF\n")
    assert read(path).text == "M\nA\nF\n"
    assert read(path, name="short.mdl").name == "short.mdl"


def test_what_is_not_a_text_file_is_refused(tmp_path):
    (tmp_path / "model.mdl").write_text("M")
    assert "did you mean" in refused(tmp_path / "modle.mdl")
    assert refused(tmp_path).startswith("E001") and "folder" in refused(tmp_path)
    assert refused(tmp_path / "a\0b").startswith("E001")
    (tmp_path / "binary").write_bytes(b"M A\nM \xff\xfe")
    assert "byte 0xff in line 2" in refused(tmp_path / "binary")
    (tmp_path / "nul").write_bytes(b"M\0A")
    assert refused(tmp_path / "nul").startswith("E003")
    (tmp_path / "large").write_bytes(b"M " * MAX_BYTES)
    assert refused(tmp_path / "large").startswith("E002")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")


def test_a_long_string_is_refused():
    with pytest.raises(MdlError):
        from_text("M" * (MAX_BYTES + 1))


@given(st.text("ab\n", max_size=40), st.integers(0, 40))
def test_line_and_column_are_those_of_counting(text, offset):
    offset = min(offset, len(text))
    before = text[:offset]
    source = Source("f", text)
    assert source.line_col(offset) == (before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)
    assert source.line_text(source.line_col(offset)[0]) == text.split("\n")[before.count("\n")]


def test_spans_join_and_print():
    source = Source("f.mdl", "M A F")
    joined = Span(source, 2, 3).to(Span(source, 0, 1))
    assert joined.text == "M A" and str(joined) == "f.mdl:1:1"


def test_errors_survive_pickling():
    with pytest.raises(MdlError) as caught:
        from_text("M\0")
    assert pickle.loads(pickle.dumps(caught.value)).diagnostics[0].code.id == "E003"
