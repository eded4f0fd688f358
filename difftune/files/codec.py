"""Nested records as tensors and JSON: `solvers.codec`, which `guidance` reads too."""

from solvers.codec import apart, decode, encode

__all__ = ["apart", "decode", "encode"]
