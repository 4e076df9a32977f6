"""This machine: Python, torch, GPU, compilers. Out: `Environment`, and `this_machine()`, what parts are chosen for.

torch is asked in another process; where there is no device of NVIDIA's, not at all for `this_machine`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mambadsl.parts.machine import Machine
from mambadsl.run.doctor.child import ask

#: Imports of everything, on a cold disk.
FACTS_LIMIT_S, MISSING_LIMIT_S = 120, 300


@dataclass(frozen=True)
class Environment:
    """facts: of `answer.facts`, empty where torch cannot be asked. remarks: what will go wrong, in words."""

    python: str
    system: str
    facts: dict[str, Any]
    triton: str | None
    driver: str | None
    nvcc: str | None
    nvcc_version: str | None
    cuda_home: str | None
    gcc: str | None
    remarks: tuple[str, ...] = ()

    @property
    def machine(self) -> Machine:
        if not self.facts.get("cuda"):
            return Machine("cpu")
        return Machine("cuda", self.facts["gpu"], tuple(self.facts["capability"]))


def has_gpu() -> bool:
    """Whether a driver of NVIDIA's is there; asks no library."""
    devices = (path for folder in ("/dev", "/dev/dri") for path in Path(folder).glob("nvidia[0-9]*"))
    return Path("/proc/driver/nvidia/version").exists() or any(devices) or Path("/dev/dxg").exists()


def this_machine() -> Machine:
    """As `build` finds it: with a GPU, the packages are imported, in another process. RuntimeError where that fails."""
    if not has_gpu():
        return Machine("cpu")
    ended = ask("missing", limit_s=MISSING_LIMIT_S)
    if not ended.answers:
        what = ended.signal or (f"exit {ended.code}" if ended.code is not None else f"no answer in {MISSING_LIMIT_S} s")
        raise RuntimeError(f"the packages of this machine cannot be looked at ({what}); `mambadsl doctor` tries each")
    found = ended.answers[-1]
    if not found["cuda"]:
        return Machine("cpu")
    missing = found["missing"]
    return Machine("cuda", found["gpu"], tuple(found["capability"]), missing=lambda package: missing.get(package.name))


def look() -> Environment:
    ended = ask("facts", limit_s=FACTS_LIMIT_S)
    facts = ended.answers[-1] if ended.answers else {}
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or _executable(home, "bin/nvcc") or _executable("/usr/local/cuda", "bin/nvcc")
    found = Environment(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        facts=facts,
        triton=_version("triton"),
        driver=_driver(),
        nvcc=nvcc,
        nvcc_version=_first(r"release ([0-9.]+)", nvcc, "--version") if nvcc else None,
        cuda_home=home,
        gcc=_compiler(),
    )
    return Environment(**{**vars(found), "remarks": tuple(_remarks(found, ended.error))})


def _remarks(e: Environment, error: str) -> Iterator[str]:
    cuda = e.facts.get("torch_cuda")
    if not e.facts:
        last = error.strip().splitlines()[-1] if error.strip() else "it said nothing"
        yield f"torch cannot be asked: {last}"
    elif not has_gpu():
        yield "no NVIDIA GPU here: parts that need one are not tried"
    elif cuda is None:
        yield "there is a GPU, and this torch is built without CUDA: install the build from pytorch.org"
    elif not e.facts["cuda"]:
        yield f"torch sees no GPU: {e.facts.get('cuda_error', 'is CUDA_VISIBLE_DEVICES empty?')}"
    elif not any(arch.startswith(f"sm_{e.facts['capability'][0]}") for arch in e.facts["built_for"]):
        yield f"this torch has no kernels for {e.facts['gpu']} (it has {', '.join(e.facts['built_for'])})"
    if cuda and e.nvcc_version and cuda.split(".")[0] != e.nvcc_version.split(".")[0]:
        yield f"nvcc is of CUDA {e.nvcc_version}, torch of {cuda}: packages built here would not load; set CUDA_HOME"
    if cuda and not e.nvcc:
        yield "no nvcc: packages that are built from source (mamba-ssm, causal-conv1d) need the CUDA toolkit of " + cuda
    if cuda and not e.gcc:
        yield "no C compiler: Triton and packages built from source need one (apt install build-essential)"


def _executable(folder: str | None, name: str) -> str | None:
    path = Path(folder or "/", name)
    return str(path) if folder and os.access(path, os.X_OK) else None


def _driver() -> str | None:
    if tool := shutil.which("nvidia-smi"):
        return _first(r"([0-9.]+)", tool, "--query-gpu=driver_version", "--format=csv,noheader")
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([0-9.]+)", path.read_text()) if path.exists() else None
    return found[1] if found else None


def _compiler() -> str | None:
    path = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")
    return f"{_first(r'([0-9]+[.][0-9.]+)', path, '-dumpfullversion') or ''} ({path})".strip() if path else None


def _first(pattern: str, *command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout)
    return found[1] if found else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
