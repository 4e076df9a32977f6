"""`python -m mambadsl`: the program, where its script is not on the path."""

from mambadsl.cli import main

if __name__ == "__main__":
    main()
