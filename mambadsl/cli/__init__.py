"""The command line, floor 7: parses flags, calls, prints. A file here for each command, found by its name.

`main()` is the program `mambadsl`. Exit codes: 0 fine, 1 problems found, 2 bad usage, 70 a bug of ours.
"""

from __future__ import annotations


def main() -> None:
    import gc

    # A short life: collecting often would take a tenth of it.
    gc.set_threshold(100_000, 20, 20)

    from mambadsl.cli.commands import cli
    from mambadsl.cli.output import harden

    harden()
    cli(prog_name="mambadsl")
