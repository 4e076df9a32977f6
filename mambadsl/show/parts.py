"""Which part fills each slot, as a table; and the pages of parts and packages.

In: an `Assignment`, a name. Out: text of at most 110 columns (`assignment_text`), plain data (`assignment_data`), and
`Page`s for `mambadsl explain`. Packages that stand in the way come once, at the end, with what to paste.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from mambadsl.parts import registry
from mambadsl.parts.part import REFERENCE, Package, Part
from mambadsl.plan.assign import Assignment, Choice, Row, missing_packages
from mambadsl.show import reference
from mambadsl.show.reference import Page, fields_text, listed, row_of

WIDTH = 110
#: Columns kept for the names of parts, at most.
WIDEST = 34


def assignment_text(name: str, found: Assignment, *, where: str) -> str:
    """name: the model's. where: the machine in words."""
    told = [c for row in found.rows for c in _told(row)]
    slots = 2 + max(len(_slot(c)) for c in told)
    parts = min(WIDEST, max(len(c.text) for c in told))
    lines = [f"{name}   parts {found.asked}   {found.dtype}   {where}", ""]
    for row in found.rows:
        lines.append(_head(row))
        for choice in _told(row):
            lines += _choice(choice, slots, parts)
        if not row.choices:
            lines.append("  its kind has no slots")
        lines.append("")
    return "\n".join([*lines, *_packages(found)]).rstrip() + "\n"


def _told(row: Row) -> list[Choice]:
    """What the table has of a layer: not the slots that stay empty because the set never fills them."""
    return [c for c in row.choices if c.part or c.refused]


def assignment_data(found: Assignment) -> dict[str, Any]:
    """Plain data: parts, dtype, machine, rows with their slots, packages with what to paste."""
    here = found.machine
    return {
        "parts": found.asked,
        "dtype": found.dtype,
        "machine": {"device": here.device, "name": here.name, "capability": here.capability},
        "rows": [
            {"label": r.label, "kind": r.kind, "paths": r.paths, "slots": [_slot_data(c) for c in r.choices]}
            for r in found.rows
        ],
        "packages": [
            {"name": p.name, "missing": reason, "install": p.install} for p, reason in packages_of(found)
        ],
    }


def packages_of(found: Assignment) -> list[tuple[Package, str | None]]:
    """Packages of the parts in use (None), and of those refused because the package is missing (why)."""
    used = [p for p in map(registry.part, found.used) if p is not None]
    refused = (part for row in found.rows for choice in row.choices for part, _ in choice.refused)
    missing = missing_packages(dict.fromkeys(part for part in refused if part != REFERENCE), found.machine)
    names = {**dict.fromkeys(n for p in used for n in (p.package, *p.needs)), **missing}
    return [(package, reason) for n, reason in names.items() if (package := registry.package(n))]


def parts_page() -> Page:
    lines = ["Parts, which fill slots; `mambadsl explain PART` or `PACKAGE` has more.", ""]
    rows = []
    for package in registry.packages().values():
        lines += [*_title(package.name, package.doc), *listed((p.name, _in_short(p)) for p in package.parts), ""]
        rows += [_part_data(part) for part in package.parts]
    return Page("parts", "\n".join(lines).rstrip() + "\n", tuple(rows))


def page(topic: str) -> Page | None:
    """The page of a part or a package; None for anything else."""
    package = registry.package(topic.partition(".")[0])
    if package is None:
        return None
    if package.name == topic:
        return _package_page(package)
    part = registry.part(topic)
    return _part_page(part, package) if part else None


def topics() -> tuple[str, ...]:
    every = registry.packages().values()
    return (*(package.name for package in every), *(part.name for package in every for part in package.parts))


def _head(row: Row) -> str:
    if row.kind == row.label == "model":
        return "around the layers"
    named = row.kind if row.label == row.kind else f"{row.label} = {row.kind}"
    uses = "1 use" if len(row.paths) == 1 else f"{len(row.paths)} uses"
    return f"{named}, {uses} ({row.paths[0]}{', ...' if len(row.paths) > 1 else ''})"


def _choice(choice: Choice, slots: int, parts: int) -> Iterator[str]:
    why = choice.why + (f"; only what `{choice.covered_by}` leaves" if choice.covered_by else "")
    head = f"  {_slot(choice):<{slots}}{choice.text:<{parts}}  "
    if len(choice.text) > parts:
        yield head.rstrip()
        head = ""
    yield from _wrapped(f"{head:<{2 + slots + parts + 2}}", why)
    reasons: dict[str, list[str]] = {}
    for part, reason in choice.refused:
        reasons.setdefault(part, []).append(reason)
    for part, why_not in reasons.items():
        yield from _wrapped(f"      not {part}: ", "; ".join(why_not), indent=8)


def _slot(choice: Choice) -> str:
    return choice.slot.partition(".")[2]


def _packages(found: Assignment) -> Iterator[str]:
    every = packages_of(found)
    for title, rows in (
        ("Missing here:", [(p, reason) for p, reason in every if reason]),
        ("Packages in use:", [(p, f"tested with {p.tested}" if p.tested else "") for p, why in every if not why]),
    ):
        if not rows:
            continue
        yield title
        names, notes = max(len(p.name) for p, _ in rows), max(min(len(note), 40) for _, note in rows)
        for package, note in rows:
            yield f"  {package.name:<{names}}  {note:<{notes}}  {package.install}".rstrip()


def _slot_data(choice: Choice) -> dict[str, Any]:
    refused = [{"part": part, "reason": reason} for part, reason in choice.refused]
    names = ("slot", "part", "text", "why", "covered_by")
    return {**{name: getattr(choice, name) for name in names}, "refused": refused}


def _package_page(package: Package) -> Page:
    facts = {
        "install": package.install, "tested": package.tested, "modules": ", ".join(package.modules),
        "source": package.source,
    }
    lines = [*_title(package.name, package.doc), *_facts(facts), "", "Parts:"]
    lines += listed((p.name, _in_short(p)) for p in package.parts)
    return Page(package.name, "\n".join(lines) + "\n", tuple(map(_part_data, package.parts)))


def _part_page(part: Part, package: Package) -> Page:
    needs = ", ".join((package.name, *part.needs))
    capability = f", compute capability {'.'.join(map(str, part.capability))} or more" * ("cuda" in part.devices)
    facts = {
        "fills": ", ".join(part.slots), "runs on": ", ".join(part.devices) + capability,
        "dtypes": ", ".join(part.dtypes), "needs": needs, "install": package.install,
    }
    lines = [*_title(part.name, part.doc), *_facts(facts), ""]
    lines += ["Arguments:", *fields_text(part.args)] if part.args else ["It takes no arguments."]
    lines += ["", f"In a model: parts mine : auto {{ {part.slots[0]} = {part.name} }}"]
    return Page(part.name, "\n".join(lines) + "\n", (_part_data(part),))


def _in_short(part: Part) -> str:
    return f"{part.doc} [{', '.join(part.slots)}]"


def _title(name: str, doc: str) -> list[str]:
    return textwrap.wrap(f"{name}: {doc}", reference.WIDTH, subsequent_indent="  ")


def _facts(facts: dict[str, str]) -> list[str]:
    return listed((name, text) for name, text in facts.items() if text)


def _part_data(part: Part) -> dict[str, Any]:
    return {
        "name": part.name, "doc": part.doc, "slots": list(part.slots), "devices": list(part.devices),
        "dtypes": list(part.dtypes), "capability": list(part.capability), "needs": list(part.needs),
        "args": [row_of(field) for field in part.args],
    }


def _wrapped(head: str, words: str, *, indent: int | None = None) -> list[str]:
    later = " " * (len(head) if indent is None else indent)
    options = dict(initial_indent=head, subsequent_indent=later, break_on_hyphens=False, break_long_words=False)
    return [line.rstrip() for line in textwrap.wrap(words, WIDTH, **options)] or [head.rstrip()]
