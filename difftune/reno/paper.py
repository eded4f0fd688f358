"""The settings of ReNO's authors by model, from their code (https://github.com/ExplainableML/ReNO): the defaults here.

All: one step without guidance, SGD with Nesterov momentum 0.9, a clip of 0.1, gamma = 0.01, 50 iterations, seed 0.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from difftune.errors import UserError
from rewards.registry import unknown
from solvers.noise import Noise, vp

REWARDS = {"hps-v2.1": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}  # the weights of the same code
PAPER_RATE, PAPER_SIZE = 5.0, 16_384  # learning rate at D = 4 x 64 x 64


@dataclass(frozen=True)
class Setting:
    """The settings of one of the paper's models."""

    models: tuple[str, ...]  # on the Hub, by which a pipeline is known again; empty: it has to be named
    size: int  # of an image, in pixels
    learning_rate: float
    timesteps: tuple[int, ...] | None = None  # of a network distilled to these alone; None: the scheduler's own


PAPER: dict[str, Setting] = {
    "sd-turbo": Setting(("stabilityai/sd-turbo",), 512, 5.0),
    "sdxl-turbo": Setting(("stabilityai/sdxl-turbo",), 512, 5.0),
    "pixart-dmd": Setting(("PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",), 512, 5.0, (400,)),
    "hyper-sdxl": Setting((), 1024, 10.0, (800,)),  # SDXL with another network: by its name it is SDXL
    "flux-schnell": Setting(("black-forest-labs/FLUX.1-schnell",), 512, 5.0),
}


def learning_rate(dimension: int) -> float:
    """5 sqrt(D / 16384): an update is bounded by a share of the noise's norm, which is sqrt(D), and that share is kept.

    It gives the paper's 5 for 512-pixel models of 4 channels, and its 10 for the 1024-pixel Hyper-SDXL.
    """
    return PAPER_RATE * sqrt(dimension / PAPER_SIZE)


def setting_of(pipe: Any, name: str | None) -> Setting | None:
    """The paper's settings of that name, or of the pipeline's model if it is one of the paper's; else None.

    Raises UserError for a name that is not known.
    """
    if name is not None and name not in PAPER:
        raise UserError(unknown("setting of ReNO's paper", name, PAPER))
    if name is not None:
        return PAPER[name]
    source = str(pipe.config.get("_name_or_path", ""))
    return next((setting for setting in PAPER.values() if source in setting.models), None)


def levels_at(scheduler: Any, timesteps: tuple[int, ...]) -> list[Noise]:
    """The levels of these timesteps of a VP scheduler, and clean data at the end."""
    powers: Tensor = scheduler.alphas_cumprod.cpu()[list(timesteps)]
    return [vp(power) for power in (*powers, torch.ones(()).to(powers))]
