"""The guidance methods, one family per file."""

from guidance.methods.catalogue import *  # noqa: F403
