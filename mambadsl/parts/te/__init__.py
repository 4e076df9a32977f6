"""NVIDIA Transformer Engine: projections in bfloat16 or FP8, with the norm before them or without; attention; norms."""
