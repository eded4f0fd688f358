"""Nested records as tensors and JSON: `guidance.codec`, which `guidance` reads too."""

from guidance.codec import apart, decode, encode

__all__ = ["apart", "decode", "encode"]
