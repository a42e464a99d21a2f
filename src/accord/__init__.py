"""Accord aligns a language model with what people want, and keeps it aligned.

The order of the folders is held by tests/form/test_imports.py: each imports only what stands above it.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
