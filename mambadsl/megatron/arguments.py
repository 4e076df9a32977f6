"""Megatron's arguments as people have them, each with its place: a shell script, YAML or JSON, or a checkpoint's.

In: a file, or a mapping. Out: `Arguments`, with Megatron's defaults for what is not given, and a record of what is
given and says nothing that is known. Raises MdlError (E621). A script is not run: its flags are read where they stand,
with the values of variables that it sets to one value only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.megatron.flags import BOOL, FLAGS, neutral, plain, spellings
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import Source, Span, from_text, read
from mambadsl.text.spell import nearest

E621 = declare(
    "E621",
    "a Megatron argument that has no counterpart",
    """
    An argument is missing, cannot be read, or asks for something that mambadsl's layers do not do, so the imported
    model would compute something else. The caret is on the argument; the message says which values have a counterpart.
    Defaults are Megatron's: without `--position-embedding-type` it learns absolute positions, without
    `--disable-bias-linear` its projections have biases.
    """,
)
W622 = declare(
    "W622",
    "a Megatron argument that was not looked at",
    """
    Nothing in the imported model follows from this argument, and it is not one of those that are known to change
    nothing that a model computes (data, training, devices, precision). It may be new, of another program, or misspelt.
    """,
)
#: Names of TransformerConfig that say what two flags say.
INSTEAD = {
    "activation_func": "`swiglu` or `squared_relu`", "gated_linear_unit": "`swiglu`",
    "softmax_scale": "nothing: there is no flag for it",
}


class Missing(Unlike):
    """An argument without a default is not given."""

    def __init__(self, name: str, more: str = ""):
        super().__init__(f"is needed and not given{more}")
        self.name = name


@dataclass(frozen=True)
class Given:
    value: Any
    span: Span | None = None


@dataclass(frozen=True)
class Arguments:
    """`arguments.hidden_size` is a value, or Megatron's default. form: "flags", "settings" (YAML, JSON, a mapping) or
    "checkpoint". unknown: what was given beside. layer, letter: what it is read for; the letters of all layers are
    `letters`."""

    given: Mapping[str, Given]
    form: str = "settings"
    unknown: Mapping[str, Given] = field(default_factory=dict)
    layer: int = 0
    letters: str = ""

    def __getattr__(self, name: str) -> Any:
        if name not in FLAGS:
            raise AttributeError(name)
        return self.given[name].value if name in self.given else FLAGS[name].default

    def needed(self, name: str) -> Any:
        """Raises Unlike where it is not given."""
        if (value := getattr(self, name)) is None:
            raise Missing(name)
        return value

    def at(self, layer: int, letters: str) -> Arguments:
        """For one layer, by its number from 1."""
        return replace(self, layer=layer, letters=letters)

    def span(self, name: str) -> Span | None:
        return self.given[name].span if name in self.given else None

    def shown(self, name: str) -> str:
        """The name as the file spells it."""
        flag = FLAGS[name].off or FLAGS[name].flag or f"--{name.replace('_', '-')}"
        return f"`{flag}`" if self.form == "flags" else f"`{name}`"

    def ignored(self) -> Iterator[Diagnostic]:
        """What says nothing that is known. A checkpoint has every argument there is: nothing of it is listed."""
        if self.form == "checkpoint":
            return
        for name, given in self.unknown.items():
            if neutral(name):
                continue
            near = nearest(name, spellings())
            help = (f"did you mean `{near.replace('_', '-') if self.form == 'flags' else near}`?",) if near else ()
            shown = f"--{name.replace('_', '-')}" if self.form == "flags" else name
            yield Diagnostic(W622, f"`{shown}` is not looked at", given.span, help=help)


def read_arguments(path: str | Path) -> Arguments:
    """Of a file of text: YAML or JSON by its name, else flags. Raises MdlError."""
    path = Path(path)
    source = read(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _settings(_loaded(source, yaml=path.suffix != ".json"), source)
    return from_flags(source)


def from_mapping(given: Mapping[str, Any], *, form: str = "settings") -> Arguments:
    """By Megatron's names or flags. Raises MdlError."""
    return _collected({str(name): Given(value) for name, value in given.items()}, form)


def from_flags(source: Source | str) -> Arguments:
    source = from_text(source, name="<arguments>") if isinstance(source, str) else source
    # Comments go, places stay.
    text = re.sub(r"(?m)(^|(?<=\s))#.*$", lambda m: " " * len(m[0]), source.text)
    words = [*re.finditer(r"[^\s\"'\\]+|\"[^\"\s]*\"|'[^'\s]*'", text)]
    variables = _variables(text)
    found: dict[str, list[Given]] = {}
    at, problems = 0, []
    while at < len(words):
        name, equals, value = words[at][0].strip("\"'").partition("=")
        start, at = words[at].start(), at + 1
        if not re.fullmatch(r"--[a-z][a-z0-9_-]*", name):
            continue
        values = [value] if equals else []
        wanted = _takes(plain(name))
        while at < len(words) and len(values) < wanted and not _ends(words[at][0]):
            values.append(words[at][0].strip("\"'"))
            at += 1
        end = words[at - 1].end()
        span = Span(source, start, end)
        try:
            if plain(name) in spellings():
                values = [_filled(value, variables) for value in values]
        except ValueError as error:
            problems.append(Diagnostic(E621, f"`{name}`: {error}", span))
            continue
        found.setdefault(plain(name), []).append(Given(" ".join(values) if values else True, span))
    if problems:
        raise MdlError(problems)
    return _collected({name: given[-1] for name, given in found.items()}, "flags")


def _ends(word: str) -> bool:
    """Whether a word is the next flag, or the shell's."""
    return bool(re.match(r"[\"']?--[a-z]", word)) or word in (";", "&&", "||", "&", ")", "}", ">") or word[0] in ")>"


def _takes(name: str) -> int:
    """How many words the argument has at most."""
    known, _ = spellings().get(name, (None, False))
    return 1 if known is None else 0 if FLAGS[known].says == BOOL else FLAGS[known].words


def _variables(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in re.finditer(r"(?m)^\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"\n]*\"|'[^'\n]*'|[^\s;#]*)", text):
        found.setdefault(line[1], set()).add(line[2].strip("\"'"))
    return found


def _filled(value: str, variables: Mapping[str, set[str]]) -> str:
    """`${NAME}` and `$NAME` by what the script sets."""
    def one(match: re.Match) -> str:
        known = variables.get(match[1] or match[2], set())
        if len(known) != 1:
            values = " and ".join(f"`{v}`" for v in sorted(known))
            what = f"is set to {values}" if known else "is not set in the file"
            raise ValueError(f"`${match[1] or match[2]}` {what}")
        return next(iter(known))

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", one, value)


def _loaded(source: Source, *, yaml: bool) -> Any:
    try:
        if not yaml:
            return json.loads(source.text)
        from yaml import safe_load
    except ImportError:
        raise MdlError([Diagnostic(E621, "reading YAML needs PyYAML", help=("pip install pyyaml",))]) from None
    except (ValueError, RecursionError) as error:
        raise MdlError([Diagnostic(E621, f"`{source.name}` is not JSON: {error}")]) from None
    from yaml import YAMLError

    try:
        return safe_load(source.text)
    except (YAMLError, RecursionError, ValueError) as error:
        raise MdlError([Diagnostic(E621, f"`{source.name}` is not YAML: {' '.join(str(error).split())}")]) from None


def _settings(loaded: Any, source: Source) -> Arguments:
    """Settings of all depths: `MODEL_ARGS:` with flags below it, `model:` with names."""
    found: dict[str, Given] = {}

    def walk(value: Any, depth: int) -> None:
        for name, inner in value.items() if isinstance(value, Mapping) and depth < 8 else ():
            if isinstance(inner, Mapping):
                walk(inner, depth + 1)
            elif re.fullmatch(r"(--)?[a-z][a-z0-9_-]*", str(name)):
                at = re.search(rf"(?m)(?<![\w-]){re.escape(str(name))}[\"']?\s*:[^\n]*", source.text)
                span = Span(source, at.start(), at.end() - at[0].endswith(",")) if at else None
                found[plain(str(name))] = Given(inner, span)

    if not isinstance(loaded, Mapping):
        raise MdlError([Diagnostic(E621, f"`{source.name}` holds no arguments")])
    walk(loaded, 0)
    return _collected(found, "settings")


def _collected(found: Mapping[str, Given], form: str) -> Arguments:
    given, unknown, problems = {}, {}, []
    for name, value in found.items():
        known, opposite = spellings().get(plain(name), (None, False))
        if known is None and name in INSTEAD and form != "checkpoint":
            problems.append(Diagnostic(E621, f"`{name}` is no argument; write {INSTEAD[name]}", value.span))
        elif known is None:
            unknown[name] = value
        elif value.value is not None:
            flag = FLAGS[known]
            try:
                read_ = flag.read(value.value)
            except (ValueError, TypeError):
                message = f"`{name}` must be {flag.says}, not `{value.value!s:.60}`"
                problems.append(Diagnostic(E621, message, value.span))
                continue
            given[known] = Given(not read_ if opposite else read_, value.span)
    if problems:
        raise MdlError(problems)
    return Arguments(given, form, unknown)
