"""How long the tool takes before it answers: whole processes, as a person at a shell waits for them.

    python benchmarks/startup.py [--json] [--runs 9]

Commands: `import mambadsl`, `check` and `plan --stages 8` of the shipped Nemotron-H 8B, and a stack of 10,000
layers checked and planned for 64 stages. Prints the median and the least of the runs, and the largest memory.
Times are of this machine as it is now: run it when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROGRAM = "from mambadsl.cli import main; main()"
MODEL = str(Path(__file__).parent.parent / "models" / "nemotron_h_8b.mdl")
LARGE = "model large {{ d_model = 1024 }}\nstack {{ [M F]*{count} }}\n"
#: By name: (argv after the interpreter, budget in seconds for the median, or None).
CASES = {
    "python alone": (["-c", "pass"], None),
    "import mambadsl": (["-c", "import mambadsl"], 0.10),
    "check": (["-c", PROGRAM, "check", MODEL], 0.35),
    "plan --stages 8": (["-c", PROGRAM, "plan", "--stages", "8", MODEL], 0.35),
}


def measure(argv: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one process; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit {process.returncode}\n{error.decode()}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def case(name: str, argv: list[str], budget: float | None, *, runs: int) -> dict:
    measure(argv)  # fills the file cache and writes the .pyc files
    found = [measure(argv) for _ in range(runs)]
    seconds = [s for s, _ in found]
    return {
        "name": name,
        "median_s": round(median(seconds), 4),
        "least_s": round(min(seconds), 4),
        "peak_bytes": max(peak for _, peak in found),
        "budget_s": budget,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    rows = [case(name, argv, budget, runs=options.runs) for name, (argv, budget) in CASES.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.mdl"
        file.write_text(LARGE.format(count=5_000))
        for name, words in (("check, 10,000 layers", ["check"]), ("plan, 10,000 layers", ["plan", "--stages", "64"])):
            argv = ["-c", PROGRAM, *words, str(file)]
            extra = ["--memory", "1TiB"] if words[0] == "plan" else []
            rows.append(case(name, argv + extra, None, runs=max(1, options.runs // 3)))
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        print(json.dumps({"machine": machine, "cases": rows}, indent=1))
        return
    print(f"{'':22} {'median':>8} {'least':>8} {'budget':>8} {'peak':>9}")
    for row in rows:
        budget = f"{row['budget_s']:.2f} s" if row["budget_s"] else "-"
        print(
            f"{row['name']:22} {row['median_s']:>6.3f} s {row['least_s']:>6.3f} s {budget:>8} "
            f"{row['peak_bytes'] / 2**20:>5.0f} MiB"
        )


if __name__ == "__main__":
    main()
