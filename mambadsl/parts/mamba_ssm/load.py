"""mamba_ssm's modules, whatever state the package is in.

In: nothing; out: the modules that the parts here call. Refuses (ImportError) a machine without the package, or
with one that is too old. The package's own `__init__` imports everything it has (a CUDA extension, transformers);
where that fails, its Triton kernels are loaded without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types

NAME = "mamba_ssm"


def load() -> None:
    """Loads what every part here needs. ImportError where the package is missing, broken or too old."""
    triton_kernels()


@functools.cache
def triton_kernels() -> types.SimpleNamespace:
    """`state`, `passing`, `bmm`, `scan`, `combined`: the modules of mamba_ssm's SSD kernels. ImportError that
    says what is missing."""
    _package()
    folder = f"{NAME}.ops.triton"
    names = {
        "bmm": "ssd_bmm", "state": "ssd_chunk_state", "passing": "ssd_state_passing", "scan": "ssd_chunk_scan",
        "combined": "ssd_combined",
    }
    modules = {short: importlib.import_module(f"{folder}.{name}") for short, name in names.items()}
    if "DETERMINISTIC_REDUCTION" not in modules["scan"]._chunk_scan_bwd_dc_kernel.arg_names:
        raise ImportError("mamba_ssm is too old: its kernels cannot sum in a fixed order (2.3 and later can)")
    return types.SimpleNamespace(**modules)


@functools.cache
def siso_kernels() -> types.SimpleNamespace:
    """`forward`, `backward`: the modules of mamba_ssm's kernels for Mamba-3 with one input a head. ImportError where
    the package has none."""
    _package()
    folder = f"{NAME}.ops.triton.mamba3"
    try:
        modules = {short: importlib.import_module(f"{folder}.mamba3_siso_{short}") for short in ("fwd", "bwd")}
    except ModuleNotFoundError as missing:
        raise ImportError(f"mamba_ssm is too old: it has no Mamba-3 (2.3.2 has): {missing}") from missing
    return types.SimpleNamespace(forward=modules["fwd"], backward=modules["bwd"])


@functools.cache
def selective_scan_extension() -> types.ModuleType:
    """mamba_ssm's CUDA extension for Mamba-1. ImportError where it is not built."""
    import torch  # noqa: F401  (the extension links against torch's libraries, which this loads)

    return importlib.import_module("selective_scan_cuda")


def _package() -> None:
    """Makes `mamba_ssm.*` importable."""
    try:
        importlib.import_module(NAME)
    except Exception as reason:
        # A half-imported package stays behind in sys.modules, and would hide the stand-in.
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]
        spec = importlib.machinery.PathFinder.find_spec(NAME)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{NAME} is not installed: {reason}") from reason
        stand_in = types.ModuleType(NAME)
        stand_in.__path__ = list(spec.submodule_search_locations)
        stand_in.__spec__ = spec
        sys.modules[NAME] = stand_in
