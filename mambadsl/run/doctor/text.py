"""A report as text, at most 110 columns: the machine, the packages with what to paste, the parts with their errors."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from mambadsl.run.doctor.environment import Environment
from mambadsl.run.doctor.packages import NOT_INSTALLED, Loaded
from mambadsl.run.doctor.report import BROKEN, Report, Tried
from mambadsl.show.units import size

WIDTH = 110
TRIED = "Parts, held to the reference on a small layer (relative errors; times before any tuning)"


def report_text(report: Report) -> str:
    blocks = [["Machine", *_machine(report.environment)], ["Packages", *_packages(report.packages)]]
    if report.tried:
        blocks.append([TRIED, *_parts(report.tried)])
    blocks.append([_verdict(report)])
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def _machine(e: Environment) -> Iterator[str]:
    facts = e.facts
    gpu = "none"
    if facts.get("cuda"):
        capability = ".".join(map(str, facts["capability"]))
        more = f", {facts['gpus']} of them" if facts["gpus"] > 1 else ""
        gpu = f"{facts['gpu']}, {size(facts['gpu_memory'])}, capability {capability}{more}"
    built = f"built for CUDA {facts['torch_cuda']}" if facts.get("torch_cuda") else "built without CUDA"
    rows = {
        "python": e.python, "system": e.system, "torch": f"{facts['torch']}, {built}" if facts else "cannot be asked",
        "GPU": gpu, "driver": e.driver, "cuDNN": facts.get("cudnn"), "triton": e.triton,
        "nvcc": f"{e.nvcc_version or 'unknown'} ({e.nvcc})" if e.nvcc else None, "CUDA_HOME": e.cuda_home,
        "C compiler": e.gcc,
    }
    for name, value in rows.items():
        yield f"  {name:<10}  {value or '-'}"
    for remark in e.remarks:
        yield from _wrapped("  ! ", remark)


def _packages(packages: Sequence[Loaded]) -> Iterator[str]:
    header = ("package", "version", "tested with", "state")
    rows = [(p.package.name, p.version or "-", p.package.tested or "-", p.state) for p in packages]
    widths = _widths([header, *rows])
    yield _line(header, widths)
    for loaded, row in zip(packages, rows):
        yield _line(row, widths)
        if loaded.error:
            yield from _wrapped("      ", " ".join(loaded.error.split())[:400])
        for line in loaded.fix:
            # Commands stay whole, to be pasted.
            yield from [f"      {line}"] if line.startswith(("pip ", "export ")) else _wrapped("      ", line)


def _parts(tried: Sequence[Tried]) -> Iterator[str]:
    header = ("part", "slot", "dtype", "forward", "gradients", "decoding", "ms", "reference", "")
    rows = [_row(row) for row in _joined(tried)]
    widths = _widths([cells for cells in [header, *rows]], last=False)
    for cells in [header, *rows]:
        yield _line(cells, widths)
    for row in tried:
        if row.status in (*BROKEN, "refused"):
            yield from _wrapped(f"  {row.part} as {row.slot}{row.dtype and f', {row.dtype}'}: ", row.detail)


def _joined(tried: Sequence[Tried]) -> Iterator[Tried]:
    """Slots of a part that is not here at all: one row."""
    last = None
    for row in tried:
        if row.status == "not here" and last == row.part:
            continue
        last = row.part if row.status == "not here" else None
        several = sum(other.part == row.part for other in tried) > 1 and row.status == "not here"
        yield Tried(row.part, f"{row.slot}, ...", row.status, detail=row.detail) if several else row


def _row(row: Tried) -> tuple[str, ...]:
    errors = (row.forward_error, row.gradients_error, row.decoding_error)
    numbers = ["" if error is None else f"{error:.0e}" if error else "0" for error in errors]
    times = [f"{ms:.2f}" if ms is not None else "" for ms in (row.ms, row.reference_ms)]
    verdict = row.detail if row.status == "not here" else row.status
    return row.part, row.slot, row.dtype, *numbers, *times, verdict


def _verdict(report: Report) -> str:
    broken = [p.package.name for p in report.packages if p.broken]
    bad = list(dict.fromkeys(row.part for row in report.tried if row.status in BROKEN))
    if broken or bad:
        return "Broken: " + ", ".join((*broken, *bad))
    absent = [p.package.name for p in report.packages if p.state == NOT_INSTALLED]
    return "Nothing that is installed is broken." + (f" Not installed: {', '.join(absent)}." if absent else "")


def _widths(rows: Sequence[Sequence[str]], *, last: bool = True) -> list[int]:
    found = [max(map(len, column)) for column in zip(*rows)]
    return found if last else [*found[:-1], 0]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return ("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths))).rstrip()


def _wrapped(head: str, words: str) -> list[str]:
    later = " " * min(len(head), 6)
    return textwrap.wrap(words, WIDTH, initial_indent=head, subsequent_indent=later, break_on_hyphens=False)
