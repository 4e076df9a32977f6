"""The matrix products per second that a device's maker states, dense, for the share of it that a run reaches."""

from __future__ import annotations

import torch

#: Part of the device's name -> dtype -> FLOP/s. NVIDIA's data sheets; float32 with TF32.
PEAKS = {
    "H200": {"bf16": 989e12, "fp32": 494e12},
    "H100": {"bf16": 989e12, "fp32": 494e12},
    "A100": {"bf16": 312e12, "fp32": 156e12},
    "B200": {"bf16": 2250e12, "fp32": 1125e12},
}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """None for a device that the table does not know."""
    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of(name: str, dtype: str) -> float | None:
    """Of a device by its name, as its driver or the planner says it."""
    return next((peaks.get(dtype) for part, peaks in PEAKS.items() if part in name.upper()), None)
