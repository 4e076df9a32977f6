"""Sizes that the kernels here hold: what `package.py` accepts and the kernels refuse. No torch."""

#: A program holds a row (or a group) of a norm in registers; a wider one would spill.
WIDEST_NORM = 16384
