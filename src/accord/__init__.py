"""Accord aligns a language model with what people want, and keeps it aligned.

The folders of this package stand in the order that tests/form/test_imports.py holds: each imports only what stands above it.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
