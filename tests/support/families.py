"""A small random pipeline of every family, by the family's name, and of every kind: what each use is tested on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import pytest

from tests.support import dits, pipelines

MADE: dict[str, Callable[..., Any]] = {  # of a scheduler, or the kind's own
    "sd": lambda scheduler=None: pipelines.sd(scheduler=scheduler),
    "sd-v": lambda scheduler=None: pipelines.sd("v_prediction", scheduler=scheduler),
    "sdxl": lambda scheduler=None: pipelines.sdxl(scheduler=scheduler),
    "sd3": dits.sd3,
    "sd3.5": partial(dits.sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": dits.flux,
    "flux-dev": partial(dits.flux, guidance_embeds=True),
    "flux2": dits.flux2,
    "flux2-dev": dits.flux2_dev,
    "chroma": dits.chroma,
    "pixart-alpha": partial(dits.pixart, diffusers.PixArtAlphaPipeline),
    "pixart-sigma": partial(dits.pixart, diffusers.PixArtSigmaPipeline),
    "sana": dits.sana,
    "sana-sigma": partial(dits.sana, out_channels=8),
    "sana-sprint": dits.sprint,
    "wan": partial(dits.wan, texts=True),
    "wan-experts": partial(dits.wan, experts=2, boundary_ratio=0.7, texts=True),
    "qwen": partial(dits.qwen, texts=True),
    "zimage": dits.zimage,
    "lumina2": dits.lumina2,
}


class Small(NamedTuple):
    """How a pipeline is made, and the guidance scale that its network is told."""

    make: Callable[[], Any]
    embedded: float | None = None


EVERY: dict[str, Small] = {
    **{name: Small(MADE[name]) for name in ("sd", "sdxl", "sd3", "flux", "flux2", "chroma")},
    "pixart": Small(MADE["pixart-sigma"]),
    "sana": Small(MADE["sana"]),
    "sana-sprint": Small(MADE["sana-sprint"], 4.5),
    "wan": Small(lambda: MADE["wan"](dits.flow())),
    **{name: Small(MADE[name]) for name in ("qwen", "zimage", "lumina2")},
}


def slow_but(names, *lean):
    """Parameters of a test, of which all but the lean ones are slow."""
    return [name if name in lean else pytest.param(name, marks=pytest.mark.slow) for name in names]
