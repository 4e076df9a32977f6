"""What a part is: code from a package that can fill a slot, and what is known of it before any of it is loaded.

A package is a folder here with a `package.py`, which has `PACKAGE`: tables only, no torch. `Part.code` names the
function that makes the callable; it is imported when a model is built with the part.

    reasons = list(part.accepts(request))          # empty: the part can fill the slot
    function = part.load()(**request.args)         # the callable, with the slot's signature
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from mambadsl.kinds.fields import Field
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.values import Values
from mambadsl.parts.machine import Machine

#: The part that every slot has: the pure-torch function of the kind.
REFERENCE = "reference"


@dataclass(frozen=True)
class Request:
    """What one slot of one layer asks for.

    fields: the layer's (of `model.*` slots, the model's settings). sub, branch: the sublayer's fields and the
    branch's (None for `model.*`). alone: the layer is the only branch of its sublayer. beside: the layer reads or gives
    something that goes past the stream. dtype: "fp32", "bf16" or "fp16", what the layer computes in. args: of the part,
    with defaults filled in.
    """

    slot: str
    fields: Values
    dims: Dims
    sub: Values | None
    branch: Values | None
    alone: bool
    dtype: str
    machine: Machine
    args: Values = Values()
    beside: bool = False


def anything(request: Request) -> Iterator[str]:
    """Accepts every request."""
    yield from ()


@dataclass(frozen=True)
class Part:
    """One piece of code that can fill `slots`.

    name: `package.part`. code: `module:function` (or the function); it takes `args` by keyword, and returns the
    callable with the slot's signature. accepts: the reasons against, for these sizes, this dtype, this machine.
    takes_norm: it does the norm before the projection as well, and is called with `norm=`, the sublayer's.
    dtypes, devices, capability: what it runs on (capability: of an NVIDIA GPU, at least).
    needs: packages beside its own.
    """

    name: str
    slots: tuple[str, ...]
    doc: str
    code: str | Callable[..., Callable[..., Any]]
    accepts: Callable[[Request], Iterable[str]] = anything
    args: tuple[Field, ...] = ()
    takes_norm: bool = False
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (8, 0)
    needs: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def load(self) -> Callable[..., Callable[..., Any]]:
        """The function that makes the callable. Imports torch and the package: ImportError if that fails."""
        return self.code if callable(self.code) else _named(self.code)

    def obstacles(self, request: Request) -> Iterator[str]:
        """Every reason why it cannot fill this slot here, installed or not."""
        here = request.machine
        if here.device not in self.devices:
            yield f"runs on {' and '.join(self.devices)}, not on {here.device}"
        elif here.device == "cuda" and here.capability is not None and here.capability < self.capability:
            found, wanted = (".".join(map(str, c)) for c in (here.capability, self.capability))
            yield f"needs compute capability {wanted}; this GPU has {found}"
        if request.dtype not in self.dtypes:
            yield f"computes in {', '.join(self.dtypes)}, not in {request.dtype}"
        yield from self.accepts(request)


@dataclass(frozen=True)
class Package:
    """An outside package and the parts that come from it.

    modules: their absence means that it is not installed. load: `module:function` that imports what its parts need,
    or raises. install: the command to paste. tested: the versions that the parts were tested with.
    fixes: a pattern in a failed import's message -> what to do.
    """

    name: str
    doc: str
    modules: tuple[str, ...]
    install: str = ""
    load: str = ""
    distribution: str = ""
    tested: str = ""
    parts: tuple[Part, ...] = ()
    fixes: Mapping[str, str] = field(default_factory=dict, hash=False)
    source: str = ""

    def import_all(self) -> None:
        """Imports what its parts need, into this process. Raises whatever the package raises: it can be anything."""
        if self.load:
            _named(self.load)()
        else:
            for name in self.modules:
                import_module(name)


def _named(code: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, function = code.partition(":")
    return getattr(import_module(module), function)
