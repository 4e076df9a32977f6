"""A flat row of names -> the short pattern a person would write: `M F M F A` -> `[M F]*2 A`.

Greedy: at each place the repeat that saves most, its body folded in turn; of the ways to cut the same repeat out, the
one whose body was there first (`A F [M F]*3`, not `A [F M]*3 F`, where `M F` came before). Linear in the row for
bodies of bounded length, so that a row of 10,000 names takes well under a second.
"""

from __future__ import annotations

MAX_BODY = 96


def fold(names: list[str]) -> str:
    """The pattern's text. Flattening it gives `names` again."""
    return " ".join(_fold(names))


def _fold(names: list[str]) -> list[str]:
    out: list[str] = []
    at = 0
    while at < len(names):
        body, count = _best(names, at)
        if count > 1 and (later := _turned(names, at, body, count)):
            out += names[at : at + later]
            at += later
        if count > 1:
            inner = _fold(names[at : at + body])
            out.append(f"{inner[0] if len(inner) == 1 and single(inner[0]) else '[' + ' '.join(inner) + ']'}*{count}")
            at += body * count
        else:
            out.append(names[at])
            at += 1
    return out


def single(text: str) -> bool:
    """Whether a repeat may follow without brackets: a name or a call, no sum, cut or repeat."""
    return text.replace("_", "a").isalnum() or (text.endswith(")") and "+" not in text.partition("(")[0])


def _best(names: list[str], at: int) -> tuple[int, int]:
    best = (1, 1)
    saved = 0
    for body in range(1, min(MAX_BODY, (len(names) - at) // 2) + 1):
        if names[at] != names[at + body]:
            continue
        count = 1
        while names[at + count * body : at + (count + 1) * body] == names[at : at + body]:
            count += 1
        if (count - 1) * body > saved:
            best, saved = (body, count), (count - 1) * body
    return best


def _turned(names: list[str], at: int, body: int, count: int) -> int:
    """By how many names later the repeat begins with the body that the row had first."""
    best, found = 0, _first(names, at, body)
    for shift in range(1, body):
        end = at + body * count + shift
        if end > len(names) or names[end - 1] != names[at + shift - 1]:
            break
        if (place := _first(names, at + shift, body)) < found:
            best, found = shift, place
    return best


def _first(names: list[str], at: int, body: int) -> int:
    """Where the names from `at` on, so many, come for the first time."""
    wanted, first = names[at : at + body], names[at]
    return next(i for i in range(at + 1) if names[i] == first and names[i : i + body] == wanted)
