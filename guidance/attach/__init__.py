"""Guidance inside a diffusers pipeline's own call."""

from guidance.attach.handle import Handle, attach, is_attached

__all__ = ["Handle", "attach", "is_attached"]
