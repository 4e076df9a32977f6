"""Megatron-Core's hybrid models: patterns, arguments and checkpoints, in and out."""
