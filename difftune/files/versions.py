"""Which software a run was made by: every result and report writes it down."""

import platform
from importlib import metadata

from difftune import __version__

LIBRARIES = ("difftune", "torch", "diffusers", "transformers", "accelerate", "peft")


def versions() -> dict[str, str | None]:
    """Python's version and those of the libraries; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def version(name: str) -> str | None:
    """The installed version of a distribution, None if it is absent."""
    if name == "difftune":  # which may run from its folder, not installed
        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
