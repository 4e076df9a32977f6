"""A device by its name. Refuses (ValueError) what torch does not know, or this machine does not have."""

from __future__ import annotations

import torch


def device(name: str | torch.device) -> torch.device:
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device `{name}` cannot be used: {reason}") from None
    return found


def usual() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
