"""tests/errors/*.mdl: chunks of text with the diagnostics expected of them, each on the guilty line.

    # facts: tp=4 parts=fused           facts of the chunk, in a comment at its top
    # set: d_model=64 M.heads=2         values from outside
    layer M = mamba2(heads=50)          ### E201 "50 cannot be split"   ### ... a second one on this line
    ### E505 "no layer"                 on a line of its own: a diagnostic without a place

The quoted regular expression is searched in the message, label, notes and help, with blanks between. Chunks
are separated by `---`; one without expectations has no diagnostics at all.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mambadsl.graph.checks import CHECKS, Facts, check
from mambadsl.graph.unroll import unroll
from mambadsl.show.explain import all_codes, homes, similar, story
from mambadsl.spec.overrides import override
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.render import to_text
from mambadsl.text.source import from_text

FOLDER = Path(__file__).parent / "errors"
EXPECTED = re.compile(r'### ([EWI]\d{3}) "(.*?)"(?=\s*(?:###|$))', re.MULTILINE)


def chunks() -> dict[str, str]:
    found = {}
    for path in sorted(FOLDER.glob("*.mdl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n---\n"), 1):
            found[f"{path.stem}-{number}"] = text
    return found


def given(text: str, what: str) -> dict[str, str]:
    line = re.search(rf"^# {what}: (.*)$", text, re.MULTILINE)
    return dict(item.split("=") for item in line[1].split()) if line else {}


def facts_of(text: str) -> Facts:
    return Facts(**{name: value_of(name, value) for name, value in given(text, "facts").items()})


def value_of(name: str, value: str):
    if name == "lora_targets":
        return tuple(value.split(","))
    return int(value) if value.isdigit() else value


def diagnostics_of(text: str, *, name: str = "model.mdl") -> tuple[Diagnostic, ...]:
    try:
        file = override(read(from_text(text, name=name)), given(text, "set"))
        return check(unroll(resolve(file)), facts_of(text)).diagnostics
    except MdlError as error:
        return error.diagnostics


def words(d: Diagnostic) -> str:
    return " ".join(filter(None, [d.message, d.label, *d.notes, *d.help]))


@pytest.mark.parametrize("name", chunks())
def test_every_expected_diagnostic_and_no_other(name):
    text = chunks()[name]
    wanted = []
    for number, line in enumerate(text.split("\n"), 1):
        assert line.count("### ") == len(EXPECTED.findall(line)), f"not understood: {line}"
        place = None if line.startswith("###") else number
        wanted += [(place, code, pattern) for code, pattern in EXPECTED.findall(line)]
    found = diagnostics_of(text)
    shown = "\n\n".join(map(to_text, found))
    places = [(d.span.line if d.span else None, d.code.id) for d in found]
    assert sorted(places, key=str) == sorted([w[:2] for w in wanted], key=str), shown
    for place, code, pattern in wanted:
        texts = [words(d) for d, at in zip(found, places) if at == (place, code)]
        assert any(re.search(pattern, t) for t in texts), f"{code}: {pattern!r} is not in {texts}"


def test_errors_come_first():
    for name, text in chunks().items():
        severities = [d.severity for d in diagnostics_of(text)]
        assert severities == sorted(severities, key=("error", "warning", "info").index), name


def test_every_code_of_the_checks_has_a_chunk():
    declared = {id for id, home in homes().items() if home.startswith("mambadsl.graph.checks.")}
    shown = {code for text in chunks().values() for code, _ in EXPECTED.findall(text)}
    assert len(declared) > 50
    assert declared <= shown, sorted(declared - shown)


def test_every_rule_file_is_in_the_list():
    import mambadsl.graph.checks as checks

    folder = Path(checks.__file__).parent
    with_check = {
        path.stem for path in folder.glob("*.py")
        if path.stem != "__init__"
        and "check" in {getattr(node, "name", "") for node in ast.parse(path.read_text()).body}
    }
    assert with_check == set(CHECKS)


def test_every_code_has_a_story():
    for id, code in all_codes().items():
        assert len(code.story) > 30 and code.title, id
        assert story(id).startswith(f"# {id}: ")


def test_stories_of_checks_say_what_why_and_instead():
    for id, home in homes().items():
        if home.startswith("mambadsl.graph.checks."):
            text = story(id)
            for part in ("\nWhy: ", "\nExample: ", "\nInstead: "):
                assert part in text, f"{id} has no {part.strip()}"
            assert all(len(line) <= 110 for line in text.split("\n")), id


def test_no_code_is_declared_twice():
    import mambadsl

    texts = [path.read_text(encoding="utf-8") for path in Path(mambadsl.__file__).parent.rglob("*.py")]
    ids = [id for text in texts for id in re.findall(r"^([EWI]\d{3}) = declare\(", text, re.MULTILINE)]
    assert len(ids) == len(set(ids)), sorted(id for id in set(ids) if ids.count(id) > 1)


def test_unknown_codes_get_the_nearest():
    assert story("E999") is None and story("nonsense") is None
    assert similar("e240")[0] == "E204"
    assert similar("W204")[0] == "E204"
    assert similar("nonsense") == ()


REPRESENTATIVE = (
    "mamba-1", "mamba-4", "mamba-5", "kernels-1", "kernels-5", "kernels-12", "attention-1", "experts-4",
    "devices-2", "devices-8", "devices-11", "precision-3", "serving-3", "targets-1", "architecture-1",
    "expects-2",
)


def test_rendered(golden):
    """How a dozen problems look to people."""
    shown = []
    for name in REPRESENTATIVE:
        for diagnostic in diagnostics_of(chunks()[name], name=f"{name}.mdl"):
            shown.append(re.sub(r"\s*### .*", "", to_text(diagnostic)))
    golden("check_errors.txt", "\n\n".join(shown) + "\n")
