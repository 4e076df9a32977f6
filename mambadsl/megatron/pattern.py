"""Megatron's pattern of layers: `M-M*-|M-ME/*E/*E` is a letter a layer, cuts into pipeline segments, and what predicts
further tokens.

In: the text. Out: `Pattern`. Raises MdlError (E620) with every problem and its place. What a pattern means is as in
Megatron-Core; where Megatron goes on with layers lost or used twice, or with two sorts of attention that its own rules
exclude, this is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from mambadsl.text.diagnostic import Diagnostic, Label, MdlError, declare
from mambadsl.text.source import Source, Span, from_text

E620 = declare(
    "E620",
    "a Megatron pattern that does not work",
    """
    In a pattern of Megatron's hybrid models each letter is a layer: `M` Mamba-2, `*` attention, `-` MLP, `E` mixture
    of experts, `G` gated DeltaNet, `+` multi-head latent attention, `D` DeepSeek's sparse attention. `|` ends a
    pipeline segment; each `/` starts the layers of one more predicted token, the same for all. There are no spaces,
    groups or repeats. Segments are dealt out to pipeline ranks in turn, so their number is a multiple of the ranks;
    a pattern without `|` is cut evenly, and a split that leaves layers out or uses them twice is refused here.
    """,
)
#: What each letter is.
LETTERS = {
    "M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts", "G": "gated DeltaNet",
    "+": "multi-head latent attention", "D": "DeepSeek sparse attention",
}
CUT, TAIL = "|", "/"
#: Letters that cannot stand beside `*`.
LATENT = "D+"


@dataclass(frozen=True)
class Pattern:
    """source: its text. main: the layers and cuts of the stack. mtp, depths: the layers that predict one further token,
    and how many tokens."""

    source: Source
    main: str
    mtp: str = ""
    depths: int = 0

    @property
    def segments(self) -> tuple[str, ...]:
        """Between the cuts."""
        return tuple(self.main.split(CUT))

    @property
    def layers(self) -> str:
        return self.main.replace(CUT, "")

    def counts(self) -> dict[str, int]:
        """Layers of each sort, those of all depths included."""
        return {letter: self.main.count(letter) + self.depths * self.mtp.count(letter) for letter in LETTERS}

    def span(self, layer: int) -> Span:
        """Of a layer of the stack, by its number."""
        at = [i for i, mark in enumerate(self.main) if mark != CUT][layer]
        return Span(self.source, at, at + 1)


def read_pattern(text: str, *, name: str = "<pattern>") -> Pattern:
    source = from_text(text, name=name)
    main, *tails = source.text.split(TAIL)
    if problems := [*_wrong(source, main, tails)]:
        raise MdlError(problems)
    if not any(tails):
        return Pattern(source, main)
    return Pattern(source, main, tails[0], len(tails))


def _wrong(source: Source, main: str, tails: list[str]) -> Iterator[Diagnostic]:
    text = source.text
    for at, mark in enumerate(text):
        span = Span(source, at, at + 1)
        if mark == CUT and at > len(main):
            help = ("the layers after `/` run in the last segment",)
            yield Diagnostic(E620, "no cuts in what predicts further tokens", span, help=help)
        elif mark not in LETTERS and mark not in (CUT, TAIL):
            near = mark.upper() if mark.upper() in LETTERS else None
            known = ", ".join(f"`{letter}` {what}" for letter, what in LETTERS.items())
            help = ("no spaces",) if mark.isspace() else (f"did you mean `{near}`?",) if near else (known,)
            shown = "a space" if mark.isspace() else f"`{mark}`"
            yield Diagnostic(E620, f"{shown} is no layer of Megatron's", span, help=help)
    latent = next((i for i, mark in enumerate(text) if mark in LATENT), None)
    if latent is not None and "*" in text:
        yield Diagnostic(
            E620, f"`*` and `{text[latent]}` cannot be in one model", Span(source, latent, latent + 1),
            labels=(Label(_char(source, text.index("*")), "attention with heads' own keys and values"),),
            notes=("latent attention changes the settings of all attention layers",),
        )
    if not main.replace(CUT, ""):
        yield Diagnostic(E620, "a pattern without layers", Span(source, 0, max(1, len(main))))
    if not any(tails):
        return
    starts = list(accumulate((len(part) + 1 for part in (main, *tails)), initial=0))[1:]
    for start, part in zip(starts, tails):
        span = Span(source, start, max(start + len(part), start + 1))
        if not part:
            yield Diagnostic(E620, "a predicted token without layers", Span(source, start - 1, start))
        elif part != tails[0] and tails[0]:
            message = f"every predicted token has the same layers: `{tails[0]}` first, `{part}` here"
            yield Diagnostic(E620, message, span)


def _char(source: Source, at: int) -> Span:
    return Span(source, at, at + 1)


def stages(
    pattern: Pattern, ranks: int = 1, *, first: int | None = None, last: int | None = None
) -> tuple[int, ...]:
    """Layers of each pipeline segment, in order. ranks: of the pipeline. first, last: layers of its ends (of a pattern
    without cuts). Raises MdlError."""
    whole = Span(pattern.source, 0, len(pattern.main))
    given = pattern.segments
    if len(given) > 1:
        if first is not None or last is not None:
            message = "the cuts say how many layers each segment has: nothing else may"
            raise MdlError([Diagnostic(E620, message, _char(pattern.source, pattern.main.index(CUT)))])
        if len(given) % ranks:
            message = f"{len(given)} segments cannot be dealt out to {ranks} pipeline ranks"
            raise MdlError([Diagnostic(E620, message, whole)])
        return tuple(map(len, given))
    count = len(pattern.layers)
    if ranks == 1:
        return (count,)
    if first is None and last is None:
        if count % ranks:
            help = ("write a `|` at each border",)
            message = f"{count} layers cannot be cut evenly into {ranks} stages"
            raise MdlError([Diagnostic(E620, message, whole, help=help)])
        return (count // ranks,) * ranks
    return _uneven(pattern, ranks, first, last)


def _uneven(pattern: Pattern, ranks: int, first: int | None, last: int | None) -> tuple[int, ...]:
    count = len(pattern.layers)
    ends = (first or 0) + (last or 0)
    middle = ranks - sum(n is not None for n in (first, last))
    if middle > 0 and count >= ends:
        if (count - ends) % middle:
            message = f"{count - ends} layers cannot be cut evenly into {middle} stages between the ends"
            raise MdlError([Diagnostic(E620, message, Span(pattern.source, 0, len(pattern.main)))])
        inner = ((count - ends) // middle,) * middle
        return (*((first,) if first is not None else ()), *inner, *((last,) if last is not None else ()))
    if count == ends and middle == 0:
        return (first, last)
    lost = count > ends
    # Those between the ends, or those that both ends have.
    start, end = first or 0, count - (last or 0)
    if not lost:
        start, end = max(0, end), min(count, first or count)
    span = Span(pattern.source, min(start, count - 1), max(end, min(start, count - 1) + 1))
    message = (
        f"{end - start} layers are in no stage: {ends} are in the ends, and there is no stage between"
        if lost else f"the ends have {ends} layers, the stack has {count}"
    )
    raise MdlError([Diagnostic(E620, message, span, "Megatron drops these" if lost else "Megatron uses these twice")])


def held(rank: int, ranks: int, segments: int) -> range:
    """The segments of a pipeline rank: dealt out in turn."""
    return range(rank, segments, ranks)


def from_ratios(layers: int, attention: float = 0, mlp: float = 0) -> str:
    """The pattern that Megatron makes of its older settings: attention spread evenly with Mamba-2 at both ends, and
    MLPs spread evenly over what is left. Raises ValueError for shares that are no shares."""
    if layers < 1 or not (0 <= attention <= 1 and 0 <= mlp <= 1 and attention + mlp <= 1):
        raise ValueError("shares are from 0 to 1, together at most 1")
    stars, dashes = round(layers * attention), round(layers * mlp)
    found = _spread(["M"] * layers, "*", (layers - stars) / (stars + 1))
    if dashes:
        found = _spread(found, "-", (layers - stars - dashes) / dashes)
    return "".join(found)


def _spread(row: list[str], mark: str, gap: float) -> list[str]:
    """A mark in place of an `M` after every `gap` others."""
    found, left = [], gap
    for old in row:
        if old != "M":
            found.append(old)
        elif left < 0.5:
            found.append(mark)
            left += gap
        else:
            found.append(old)
            left -= 1
    return found
