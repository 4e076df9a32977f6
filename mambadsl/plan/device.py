"""What a device can do, for the roofline, the transfers and the memory limit.

In: a name (`h200`), or a JSON file of measured layer times. Out: a frozen `Device`. Refuses an unknown name
(E820) and a file that is not what it should be (E821), naming the key.

A file of measured layer times:

    {
      "base": "h200",                              what is not said here is this device's
      "name": "h200, measured 2026-08",            optional
      "microbatch_tokens": 8192,                   tokens in a microbatch when these times were taken
      "layers": {                                  by path ("head", "stack.7"), else by kind ("mamba2")
        "mamba2": {"forward_s": 0.0021, "backward_input_s": 0.0024, "backward_weight_s": 0.0016}
      }
    }

Every other field of `Device` may stand in the file too (`memory_bytes`, `link_bytes_per_s`, ...). A layer may
add `activation_bytes` (kept from its forward to its backward) and `working_bytes` (on top while it runs).
`plan --measure` writes such a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mambadsl.plan.unit import Unit
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import E001

E820 = declare(
    "E820",
    "there is no such device",
    """
    A device is one of the names the message lists, or a path that ends in `.json`: a file of layer times
    measured on your machine. Its format is at the top of `mambadsl/plan/device.py`.
    """,
)
E821 = declare(
    "E821",
    "the file of measured layer times is not valid",
    """
    It is a JSON object with `base`, `microbatch_tokens` and `layers`; each layer has `forward_s`,
    `backward_input_s` and `backward_weight_s`, in seconds for one microbatch, and maybe `activation_bytes` and
    `working_bytes`. `plan --measure FILE` writes it. The message names the key. Times taken with another number
    of tokens in a microbatch are refused, not scaled: kernels do not scale in proportion.
    """,
)

GB, GIB = 10**9, 2**30
#: Times of each of 10,000 layers take some 2 MB.
MAX_BYTES = 16 * 2**20
#: No device has a number beyond these; times computed from them stay finite.
LEAST, MOST = 1e-15, 1e24
MOST_BESIDE = 100


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Measured, for one microbatch. `name`: a path or a kind."""

    name: str
    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    activation_bytes: int | None = None
    working_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its link to the next stage's.

    bf16_flops, bytes_per_s: what large kernels achieve. memory_bytes: all of it; usable: the part that a plan
    may fill (the rest: the context, fragments, the collectives' buffers). kernel_s: the least time of a layer
    pass. action_s: host time that an action of the schedule adds. link_*: one direction between two stages.
    beside_transfer: how many times longer layers take while their rank waits for a transfer, or sends. layers_ran: in
    words, how those of `layer_times` did.
    """

    name: str
    bf16_flops: float
    bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float
    link_latency_s: float
    kernel_s: float
    action_s: float
    usable: float = 0.92
    beside_transfer: float = 1.0
    microbatch_tokens: int | None = None
    layers_ran: str = ""
    layer_times: tuple[LayerTime, ...] = ()

    @property
    def memory_limit(self) -> int:
        return int(self.memory_bytes * self.usable)


#: Achieved, not peak. H200 SXM: peak 989 TFLOP/s dense bf16, 4.8 TB/s, 141 GB (NVIDIA data sheet); a large
#: matmul and a large copy measured 790 TFLOP/s and 4.3 TB/s. H100 SXM: the same FLOP/s, 3.35 TB/s, 80 GB;
#: A100 SXM 80 GB: 312 TFLOP/s, 2.04 TB/s: both by the H200's fractions (0.8 and 0.9), not measured. Links:
#: NVLink 4 (450 GB/s a direction) and NVLink 3 (300), at 0.8; latency and host times are estimates. NCCL's kernels wait
#: on the GPU's own processors: 1.15 is what makes 1F1B as slow as two H200 ran it, and then interleaved as well
#: (benchmarks/results/2026-11-22-scale.md); `plan --measure` under torchrun measures it.
#: `cpu` is a nominal 8-core server: plans of small runs keep proportion, times need a measured file.
DEVICES = {
    device.name: device
    for device in (
        Device("h200", 790e12, 4.3e12, 141 * GB, 360e9, 10e-6, 10e-6, 50e-6, beside_transfer=1.15),
        Device("h100", 790e12, 3.0e12, 80 * GB, 360e9, 10e-6, 10e-6, 50e-6, beside_transfer=1.15),
        Device("a100", 250e12, 1.8e12, 80 * GB, 240e9, 10e-6, 10e-6, 50e-6, beside_transfer=1.15),
        Device("cpu", 0.4e12, 40e9, 64 * GIB, 2e9, 100e-6, 5e-6, 500e-6),
    )
}


def device(which: str | Path | Device) -> Device:
    """A device by name, or from a file of measured times (a path ending in `.json`)."""
    if isinstance(which, Device):
        return which
    if str(which).endswith(".json"):
        return _from_file(Path(which))
    if str(which) in DEVICES:
        return DEVICES[str(which)]
    from mambadsl.text.spell import nearest

    near = nearest(str(which), list(DEVICES))
    help = (f"did you mean `{near}`?",) if near else ()
    listed = f"devices: {', '.join(DEVICES)}, or a `.json` file of measured layer times"
    raise MdlError([Diagnostic(E820, f"there is no device `{which}`", help=(*help, listed))])


def measured(
    units: Sequence[Unit], device: Device, *, microbatch_tokens: int | None = None
) -> tuple[Unit, ...]:
    """The units with the device's measured times in place of computed ones, by path, else by kind."""
    if not device.layer_times:
        return tuple(units)
    if microbatch_tokens not in (None, device.microbatch_tokens):
        message = (
            f"the layer times of `{device.name}` are for {device.microbatch_tokens:,} tokens a microbatch, "
            f"this plan has {microbatch_tokens:,}"
        )
        raise MdlError([Diagnostic(E821, message, help=("measure again, or plan for that many tokens",))])
    times = {time.name: time for time in device.layer_times}
    known = {name for unit in units for name in (unit.path, unit.kind)}
    if strangers := [name for name in times if name not in known]:
        message = f"`{device.name}` has times for `{strangers[0]}`, which is no layer or kind of this model"
        raise MdlError([Diagnostic(E821, message, help=(f"kinds here: {_kinds(units)}",))])

    def one(unit: Unit) -> Unit:
        time = times.get(unit.path) or times.get(unit.kind)
        if time is None:
            return unit
        known = {name: size for name in _SIZES if (size := getattr(time, name)) is not None}
        return replace(
            unit, forward_s=time.forward_s, backward_input_s=time.backward_input_s,
            backward_weight_s=time.backward_weight_s, **known,
        )

    return tuple(map(one, units))


def _kinds(units: Sequence[Unit]) -> str:
    return ", ".join(dict.fromkeys(unit.kind for unit in units))


_TEXT, _COUNTS = ("name", "layers_ran"), ("memory_bytes", "microbatch_tokens")
_OWN = {f.name for f in fields(Device)} - {"layer_times"}
_TIMES = ("forward_s", "backward_input_s", "backward_weight_s")
_SIZES = ("activation_bytes", "working_bytes")


def _from_file(path: Path) -> Device:
    text = _text(path)
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MdlError([Diagnostic(E821, f"`{path}` is not JSON: {error}")]) from None
    found: list[Diagnostic] = []

    def bad(message: str, *help: str) -> None:
        found.append(Diagnostic(E821, f"`{path}`: {message}", help=help))

    def wrong(key: str, value: object, must: str) -> None:
        missing = value is None
        bad(f"`{key}` is missing; it is {must}" if missing else f"`{key}` must be {must}, not {_what(value)}")

    if not isinstance(data, dict):
        bad(f"a JSON object is needed, not {_what(data)}")
        raise MdlError(found)
    base = data.get("base")
    if not isinstance(base, str) or base not in DEVICES:
        wrong("base", base, f"one of {', '.join(DEVICES)}")
    own: dict[str, object] = {"name": path.stem}
    for key, value in data.items():
        if key in ("base", "layers"):
            continue
        if key not in _OWN:
            bad(f"there is no key `{key}`", f"keys: base, layers, {', '.join(sorted(_OWN))}")
        elif key in _TEXT:
            own[key] = value
            if not isinstance(value, str):
                wrong(key, value, "text")
        elif key == "usable" and not (_positive(value) and value <= 1):
            wrong(key, value, "a positive number, at most 1")
        elif key == "beside_transfer" and not (_number(value) and 1 <= value <= MOST_BESIDE):
            wrong(key, value, f"a number from 1 to {MOST_BESIDE}")
        elif not _positive(value) or (key in _COUNTS and int(value) != value):
            wrong(key, value, f"a positive {'whole ' * (key in _COUNTS)}number of a size that devices have")
        else:
            own[key] = value
    layers = data.get("layers", {})
    if not isinstance(layers, dict):
        wrong("layers", layers, "an object")
        layers = {}
    if layers and "microbatch_tokens" not in data:
        bad("`microbatch_tokens` is missing: layer times mean nothing without it")
    times = []
    for name, entry in layers.items():
        if not isinstance(entry, dict):
            bad(f"`layers.{name}` must be an object, not {_what(entry)}")
            continue
        for key in (*_TIMES, *entry):
            if key not in (*_TIMES, *_SIZES):
                bad(f"there is no key `layers.{name}.{key}`", f"keys: {', '.join((*_TIMES, *_SIZES))}")
            elif not (_number(entry.get(key)) and 0 <= entry[key] <= MOST):
                wrong(f"layers.{name}.{key}", entry.get(key), "a number, 0 or more")
        times.append((name, entry))
    if found:
        raise MdlError(dict.fromkeys(found))
    layer_times = tuple(LayerTime(name, **entry) for name, entry in times)
    return replace(DEVICES[base], **own, layer_times=layer_times)


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise MdlError([Diagnostic(E001, f"`{path}` is not a regular file")])
        if path.stat().st_size > MAX_BYTES:
            message = f"`{path}` is larger than any file of layer times ({MAX_BYTES // 2**20} MiB)"
            raise MdlError([Diagnostic(E821, message)])
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise MdlError([Diagnostic(E001, f"`{path}` cannot be read: {reason}")]) from None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and LEAST <= value <= MOST


def _what(value: object) -> str:
    return f"`{json.dumps(value)[:40]}`"
