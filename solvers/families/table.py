"""The table of the families of pipelines, which `LatentModel` and `attach` read: nothing else knows their differences.

A new family is one file beside this one, and its name in `FAMILIES`. `attach` needs what the pipeline calls its
denoiser with and what it does to the guided prediction; `LatentModel` needs `encode` and `call` besides, and says so of
a family that has none.
"""

from diffusers import DiffusionPipeline

from solvers.errors import UserError
from solvers.families.chroma import CHROMA
from solvers.families.family import Family
from solvers.families.flux import FLUX
from solvers.families.flux2 import FLUX2
from solvers.families.lumina2 import LUMINA2
from solvers.families.pixart import PIXART
from solvers.families.qwen import QWEN
from solvers.families.sana import SANA
from solvers.families.sd import SD
from solvers.families.sd3 import SD3
from solvers.families.sdxl import SDXL
from solvers.families.sprint import SPRINT
from solvers.families.wan import WAN
from solvers.families.zimage import ZIMAGE

KNOWN = (SD, SDXL, SD3, FLUX, FLUX2, CHROMA, PIXART, SANA, SPRINT, WAN, QWEN, ZIMAGE, LUMINA2)
FAMILIES: dict[str, Family] = {family.name: family for family in KNOWN}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family that lists the pipeline's class; ValueError, naming the class and the known ones, where none does."""
    name = type(pipe).__name__
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise UserError(f"no family for {name}; known pipelines: {known}")
