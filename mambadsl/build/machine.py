"""This machine, as parts are chosen for it: a torch device -> Machine, its packages imported to see whether they load.

A package that crashes the interpreter when it is imported would crash this one too: `mambadsl doctor` tries each in a
process of its own.
"""

from __future__ import annotations

from functools import cache

import torch

from mambadsl.parts.machine import Machine, not_found
from mambadsl.parts.part import Package


def machine(device: torch.device) -> Machine:
    """The machine around `device`; for the meta device, which only stands for memory, this machine's best."""
    if device.type == "cuda" or device.type == "meta" and torch.cuda.is_available():
        index = device.index if device.type == "cuda" else None
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        return Machine("cuda", name, capability, missing=missing)
    return Machine("cpu", missing=missing)


@cache
def missing(package: Package) -> str | None:
    """Why the package cannot be used in this process; None where it can. What it raises is the reason, whatever it
    is: extension modules fail in many ways."""
    if absent := not_found(package.modules):
        return absent
    try:
        package.import_all()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"does not load ({type(error).__name__}: {first})"
    return None
