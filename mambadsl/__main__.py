"""`python -m mambadsl` is the `mambadsl` command."""

from mambadsl.cli import main

if __name__ == "__main__":
    main()
