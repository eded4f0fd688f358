"""Guidance inside a diffusers pipeline's own call: the hooks on its network and its scheduler."""

from guidance.attach.handle import Handle, attach, is_attached

__all__ = ["Handle", "attach", "is_attached"]
