"""Decoding, one token a row and step: `steps.py` puts a whole sublayer together from the kernels beside it."""
