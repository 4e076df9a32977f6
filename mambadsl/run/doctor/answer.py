"""What runs in doctor's processes: `facts`, `missing`, `load PACKAGE`, `try PART SLOT...` -> JSON lines.

    python -m mambadsl.run.doctor.answer load mamba_ssm
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mambadsl.parts import registry
from mambadsl.parts.plugins import load_parts

Answers = Iterator[dict[str, Any]]


def facts() -> Answers:
    """Of torch and the GPU it sees."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    found["cxx11_abi"] = torch.compiled_with_cxx11_abi()
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    # 91002 is 9.10.2; before 9, 8902 was 8.9.2.
    large = 10_000 if cudnn and cudnn >= 90_000 else 1_000
    found["cudnn"] = f"{cudnn // large}.{cudnn % large // 100}.{cudnn % 100}" if cudnn else None
    found["cuda"] = torch.cuda.is_available()
    if found["cuda"]:
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": [gpu.major, gpu.minor], "gpu_memory": gpu.total_memory}
        found |= {"gpus": torch.cuda.device_count(), "built_for": torch.cuda.get_arch_list()}
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:
            found["cuda_error"] = str(error).splitlines()[0]
    yield found


def missing() -> Answers:
    """The machine as `build` sees it: the facts, and why packages cannot be used."""
    from mambadsl.build.machine import missing

    [found] = facts()
    yield {**found, "missing": {name: missing(package) for name, package in registry.packages().items()}}


def load(name: str) -> Answers:
    """Imports a package as its parts would."""
    package = registry.package(name)
    try:
        package.import_all()
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        yield {"loads": False, "type": type(error).__name__, "error": str(error), "absent": absent}
    else:
        yield {"loads": True}


def compare(part: str, *slots: str) -> Answers:
    from mambadsl.run.doctor.kernels import check
    from mambadsl.run.doctor.untuned import untuned

    with untuned():
        for slot in slots:
            # Where the process ends here, it is this slot's doing.
            yield {"trying": slot}
            yield from check(part, slot)


QUESTIONS: dict[str, Callable[..., Answers]] = {"facts": facts, "missing": missing, "load": load, "try": compare}


def main(words: list[str]) -> None:
    while words[0] == "--load":
        load_parts(words[1])
        words = words[2:]
    for answer in QUESTIONS[words[0]](*words[1:]):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
