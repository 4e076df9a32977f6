"""Whether a package loads, in a process of its own, and if not, what is wrong and what to paste.

In: a package. Out: `Loaded`. The causes are a table of what loaders and CUDA say; a package's own `fixes` come first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from mambadsl.parts.machine import not_found
from mambadsl.parts.part import Package
from mambadsl.run.doctor.child import Ended, ask

#: mamba-ssm and Transformer Engine take a minute on a cold disk.
LIMIT_S = 180

NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Loaded:
    """state: "ok", "not installed", or what is wrong in a few words. error: what the package said. fix: words and
    commands to paste."""

    package: Package
    version: str | None
    state: str
    error: str = ""
    fix: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.state == "ok"

    @property
    def broken(self) -> bool:
        return self.state not in ("ok", NOT_INSTALLED)


@dataclass(frozen=True)
class Cause:
    """pattern: in what was raised. state: what it means. fix: {rebuild} and {install} are the package's commands."""

    pattern: str
    state: str
    fix: tuple[str, ...]


_AGAINST_THIS = "rebuild it against this torch (without the cache: pip may keep the wheel of the other):"
CAUSES = (
    Cause(
        r"No module named '(\w+_cuda|transformer_engine_torch)'",
        "built without its CUDA code",
        ("build it with nvcc at hand, and no *_SKIP_CUDA_BUILD set:", "{rebuild}"),
    ),
    Cause(r"undefined symbol", "built against another torch", (_AGAINST_THIS, "{rebuild}")),
    Cause(
        r"no kernel image is available|device kernel image is invalid|unsupported toolchain",
        "built for other GPUs",
        ("rebuild it on this machine, for this GPU:", "{rebuild}"),
    ),
    Cause(
        r"driver version is insufficient|forward compatibility was attempted",
        "the driver is older than its CUDA",
        ("update the NVIDIA driver, or install a torch of an older CUDA and rebuild:", "{rebuild}"),
    ),
    Cause(
        r"lib(cudart|cublas\w*|nvrtc|cusparse|cusolver|cufft)[\w.-]*\.so[.\d]*: cannot open",
        "built for another CUDA",
        ("its CUDA libraries are not those of this torch; rebuild it:", "{rebuild}"),
    ),
    Cause(
        r"libcudnn[\w.-]*\.so[.\d]*: cannot open|cudnn\.h",
        "cuDNN is missing",
        ("pip install nvidia-cudnn-cu{cuda}", "{install}"),
    ),
    Cause(r"(\S+\.so[.\d]*): cannot open shared object", "a shared library is missing", ("{install}",)),
    Cause(
        r"version `(GLIBC|GLIBCXX|CXXABI)_[\d.]+' not found",
        "built on a newer system",
        ("build it here:", "{rebuild}"),
    ),
    Cause(
        r"CUDA_HOME|bare_metal_version|nvcc.*not found",
        "needs the CUDA toolkit",
        ("install the toolkit of torch's CUDA, and: export CUDA_HOME=/usr/local/cuda", "{install}"),
    ),
    Cause(r"cannot import name|has no attribute", "not the version tested", ("tested with {tested}:", "{rebuild}")),
)


def look(package: Package, *, cuda: str | None = None) -> Loaded:
    """Imports the package elsewhere. cuda: torch's CUDA, "13.0", for the fix."""
    found = _version(package)
    if not_found(package.modules):
        absent = [name for name in package.modules if not_found((name,))]
        # Its own module is there, and one that it needs is not.
        if absent and package.modules[0] not in absent:
            names = " ".join(absent)
            return Loaded(package, found, "a dependency is missing", f"no module {names}", (f"pip install {names}",))
        return Loaded(package, found, NOT_INSTALLED, fix=(package.install,) if package.install else ())
    ended = ask("load", package.name, limit_s=LIMIT_S)
    state, error, fix = classify(package, ended, cuda=cuda)
    return Loaded(package, found, state, error, fix, ended.seconds)


def classify(package: Package, ended: Ended, *, cuda: str | None = None) -> tuple[str, str, tuple[str, ...]]:
    """(state, error, fix) of a process that loaded it."""
    rebuild = _rebuild(package.install)
    if ended.code is None:
        return f"no end after {LIMIT_S} s", last_line(ended.error), ("it hangs when imported; reinstall it:", rebuild)
    if ended.signal:
        why = "an extension module for another torch, CUDA or processor; rebuild it:"
        return f"crashes Python ({ended.signal})", last_line(ended.error), (why, rebuild)
    if not ended.answers:
        return f"ends Python (exit {ended.code})", last_line(ended.error), ("reinstall it:", rebuild)
    answer = ended.answers[-1]
    if answer["loads"]:
        return "ok", "", ()
    said = f"{answer['type']}: {answer['error']}"
    words = dict(
        rebuild=rebuild, install=package.install, tested=package.tested or "other versions",
        cuda=(cuda or "12").partition(".")[0],
    )
    for pattern, fix in package.fixes.items():
        if re.search(pattern, said):
            return "does not load", said, (fix,)
    for cause in CAUSES:
        if re.search(cause.pattern, said):
            return cause.state, said, tuple(line.format(**words) for line in cause.fix)
    if answer["absent"]:
        return "a dependency is missing", said, (f"pip install {answer['absent'].partition('.')[0]}",)
    tested = f"tested with {package.tested}; reinstall it:" if package.tested else "reinstall it:"
    return "does not load", said, (tested, rebuild)


def _rebuild(install: str) -> str:
    """The install command, anew."""
    return re.sub(r"^pip install", "pip install --force-reinstall --no-cache-dir --no-deps", install)


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _version(package: Package) -> str | None:
    try:
        return version(package.distribution or package.name)
    except PackageNotFoundError:
        return None
