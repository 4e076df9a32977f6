"""Transformer Engine's torch package, imported where a part needs it. ImportError, with the cause, where it cannot.

It must come before other code loads cuDNN (liger and peft do): loaded late, it may open the system's cuDNN beside
torch's, and symbols are missing.
"""

from __future__ import annotations

from types import ModuleType


def load() -> ModuleType:
    """`transformer_engine.pytorch`. ImportError if it is not installed, was built for another torch or CUDA, or
    found the wrong cuDNN."""
    try:
        import transformer_engine.pytorch as te
    except ImportError:
        raise
    except Exception as error:
        # Its loader opens libraries by hand, and fails with OSError, RuntimeError or AssertionError.
        raise ImportError(f"Transformer Engine does not load: {error}") from error
    return te
