"""Reference pages: every field of every kind is on its page, every code has a title."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mambadsl.kinds.fields import REQUIRED
from mambadsl.kinds.registry import all_kinds, get, names
from mambadsl.show.explain import homes
from mambadsl.show.reference import WIDTH, page, titles, topics


@pytest.mark.parametrize("topic", topics())
def test_pages_fit_and_have_rows(topic):
    found = page(topic)
    assert found.topic == topic and found.rows
    assert max(map(len, found.text.splitlines())) <= WIDTH
    assert all(row["doc"] for row in found.rows)


@pytest.mark.parametrize("name", names())
def test_a_kind_s_page_has_its_fields_and_slots(name):
    kind, found = get(name), page(name)
    assert [row["name"] for row in found.rows] == [f.name for f in kind.fields]
    assert [row["name"] for row in found.rows if row["required"]] == [
        f.name for f in kind.fields if f.default is REQUIRED
    ]
    assert all(f"{name}.{slot.name}" in found.text for slot in kind.slots)


def test_kinds_page_lists_all():
    assert [row["name"] for row in page("kinds").rows] == [kind.name for kind in all_kinds()]


def test_every_code_has_its_title():
    """The titles read from the text are those that the files declare."""
    from mambadsl.text.diagnostic import CODES

    found = titles()
    assert list(found) == list(homes())
    assert all(CODES[id].title == title for id, title in found.items() if id in CODES)
    assert page("codes").text.count("E204  ") == 1


def test_the_list_of_codes_needs_no_torch():
    script = "import sys; from mambadsl.show.reference import page; page('codes'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_page_for_anything_else():
    assert page("nothing") is None
