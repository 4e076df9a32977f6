"""Reference text from the tables: fields of a kind, of every layer, of the model; lists of kinds, parts and codes.

In: a topic, as `mambadsl explain` takes it. Out: `Page`s. The codes' own stories are in explain.py, the pages of parts
in parts.py.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mambadsl.kinds.fields import REQUIRED, Computed, Field, Flag, Int, OneForm, OrWord
from mambadsl.kinds.registry import all_kinds, get, known, names

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Page:
    """text for people; rows: the same as plain data, one for each field or item."""

    topic: str
    text: str
    rows: tuple[dict[str, Any], ...]


def page(topic: str) -> Page | None:
    """The page of one of `TOPICS`, a kind, a package or a part; None for anything else."""
    from mambadsl.show import parts

    if topic in TOPICS:
        return TOPICS[topic]()
    return _kind(topic) if known(topic) else parts.page(topic)


def topics() -> tuple[str, ...]:
    from mambadsl.show import parts

    return (*TOPICS, *names(), *parts.topics())


def _kind(name: str) -> Page:
    kind = get(name)
    lines = [f"{kind.name}: {kind.doc}"]
    if kind.source:
        lines.append(f"source: {kind.source}")
    lines += ["", *fields_text(kind.fields)]
    if kind.slots:
        lines += ["", "Slots, which a part set fills:", *listed((f"{name}.{s.name}", s.doc) for s in kind.slots)]
    lines += ["", "Every layer has more fields: `mambadsl explain layer`."]
    return Page(name, "\n".join(lines) + "\n", tuple(map(row_of, kind.fields)))


def _layer() -> Page:
    from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS

    lines = [
        "Fields of every layer, whatever its kind.",
        "",
        *fields_text(SUBLAYER_FIELDS),
        "",
        "And of each branch of a sum (`M + A`):",
        "",
        *fields_text(BRANCH_FIELDS),
    ]
    return Page("layer", "\n".join(lines) + "\n", tuple(map(row_of, (*SUBLAYER_FIELDS, *BRANCH_FIELDS))))


def _model() -> Page:
    from mambadsl.spec.model import MODEL_FIELDS

    lines = ["Settings of a `model NAME { ... }` block.", "", *fields_text(MODEL_FIELDS)]
    return Page("model", "\n".join(lines) + "\n", tuple(map(row_of, MODEL_FIELDS)))


def _mtp() -> Page:
    from mambadsl.spec.model import MTP_FIELDS

    lines = ["Arguments of `mtp(...) { PATTERN }`, the multi-token-prediction tail.", "", *fields_text(MTP_FIELDS)]
    return Page("mtp", "\n".join(lines) + "\n", tuple(map(row_of, MTP_FIELDS)))


def _kinds() -> Page:
    return _list(
        "kinds", "Kinds of layers; `mambadsl explain KIND` has the fields.", ((k.name, k.doc) for k in all_kinds())
    )


def _sets() -> Page:
    from mambadsl.parts.sets import SETS

    items = ((s.name, s.doc) for s in SETS.values())
    return _list("sets", "Part sets: which code fills the slots of the kinds.", items)


def _parts() -> Page:
    from mambadsl.show.parts import parts_page

    return parts_page()


def _targets() -> Page:
    from mambadsl.graph.checks.targets import TARGETS

    return _list("targets", "Other tools, for `mambadsl check --target`.", ((n, t.doc) for n, t in TARGETS.items()))


def _codes() -> Page:
    from mambadsl.text.diagnostic import FAMILIES

    found = titles()
    lines = ["Codes: E error, W warning, I remark; `mambadsl explain CODE` has the story."]
    for digit, family in FAMILIES.items():
        here = [(id, title) for id, title in found.items() if id[1] == digit]
        lines += ["", f"{digit}xx  {family}", *listed(here)] if here else []
    return Page("codes", "\n".join(lines) + "\n", tuple({"name": i, "doc": t} for i, t in found.items()))


TOPICS: dict[str, Callable[[], Page]] = {
    "model": _model,
    "layer": _layer,
    "mtp": _mtp,
    "kinds": _kinds,
    "sets": _sets,
    "parts": _parts,
    "targets": _targets,
    "codes": _codes,
}


def titles() -> dict[str, str]:
    """Every code's title, read from the files' text: importing them all would load torch."""
    from importlib.util import find_spec

    from mambadsl.show.explain import homes

    found = {}
    for id, home in homes().items():
        with open(find_spec(home).origin, encoding="utf-8") as file:
            match = re.search(rf'^{id} = declare\(\s*"{id}",\s*"([^"]*)"', file.read(), re.MULTILINE)
        if match is None:
            raise ValueError(f"the title of {id} in {home} is not plain text")
        found[id] = match[1]
    return found


def _list(topic: str, head: str, items: Iterable[tuple[str, str]]) -> Page:
    items = tuple(items)
    return Page(topic, "\n".join([head, "", *listed(items)]) + "\n", tuple({"name": n, "doc": d} for n, d in items))


def listed(items: Iterable[tuple[str, str]]) -> list[str]:
    items = tuple(items)
    wide = max((len(name) for name, _ in items), default=0)
    return [line for name, doc in items for line in _two(f"  {name:<{wide}}  ", doc)]


def fields_text(fields: tuple[Field, ...]) -> list[str]:
    heads = [f"  {f.name} = {_default(f)}" if f.default is not REQUIRED else f"  {f.name}" for f in fields]
    wide = min(34, max(map(len, heads), default=0))
    lines = []
    for f, head in zip(fields, heads):
        unit = f", in {f.unit}" if f.unit else ""
        plain = isinstance(f.type, (Int, Flag)) and f.default is not REQUIRED
        words = f"{f.doc}{unit}" if plain else f"{f.doc}{unit} [{_says(f)}]"
        if len(head) > wide:
            lines.append(head)
            head = ""
        lines += _two(f"{head:<{wide}}  ", words)
    return lines


def _two(head: str, words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def row_of(field: Field) -> dict[str, Any]:
    required = field.default is REQUIRED
    return {
        "name": field.name,
        "default": None if required else _default(field),
        "required": required,
        "value": _says(field),
        "unit": field.unit,
        "doc": field.doc,
    }


def _default(field: Field) -> str:
    """The value in the language, or how it follows from others."""
    if field.default is REQUIRED:
        return ""
    return field.default.says if isinstance(field.default, Computed) else field.type.text(field.default)


def _says(field: Field) -> str:
    """What the value may be; forms with their fields' names."""
    required = "required; " if field.default is REQUIRED else ""
    inner = field.type.type if isinstance(field.type, OrWord) else field.type
    if not isinstance(inner, OneForm):
        return required + field.type.says
    forms = [f"{n}({', '.join(f.name for f in fs)})" if fs else n for n, fs in inner.forms.items()]
    return required + "one of " + ", ".join(forms)
