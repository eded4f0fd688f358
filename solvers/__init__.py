"""Noise levels, denoisers, samplers, and how to differentiate through them."""

__distribution__ = "difftune"
