"""A small random pipeline of every family, by the family's name: what each use is tested on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.support import dits, pipelines


class Small(NamedTuple):
    """How a pipeline is made, and the guidance scale that its network is told."""

    make: Callable[[], Any]
    embedded: float | None = None


EVERY: dict[str, Small] = {
    "sd": Small(pipelines.sd),
    "sdxl": Small(pipelines.sdxl),
    "sd3": Small(dits.sd3),
    "flux": Small(dits.flux),
    "flux2": Small(dits.flux2),
    "chroma": Small(dits.chroma),
    "pixart": Small(dits.pixart),
    "sana": Small(dits.sana),
    "sana-sprint": Small(dits.sprint, 4.5),
    "wan": Small(lambda: dits.wan(dits.flow(), texts=True)),
    "qwen": Small(lambda: dits.qwen(texts=True)),
    "zimage": Small(dits.zimage),
    "lumina2": Small(dits.lumina2),
}


def slow_but(names, *lean):
    """Parameters of a test, of which all but the lean ones are slow."""
    return [name if name in lean else pytest.param(name, marks=pytest.mark.slow) for name in names]
