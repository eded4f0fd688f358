"""The table of the families of pipelines, which `LatentModel` and `attach` read: nothing else knows their differences.

A new family is one file beside this one, and its name in `FAMILIES`. `attach` needs what the pipeline calls its
denoiser with and what it does to the guided prediction; `LatentModel` needs `encode` and `call` besides, and refuses a
family without them.
"""

from pathlib import Path

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

REFUSED = {  # pipelines that people run and that no family knows, each with the reason
    "HiDreamImagePipeline": "its experts run under no_grad outside of training, so that gradients would be wrong;"
    " attach was not tried",
    "HunyuanImagePipeline": "it guides by a guider of its own, and its gradient checkpointing ends in a TypeError",
    "Kandinsky5T2IPipeline": "its rotary embedding rounds to bfloat16 in every dtype, so gradients cannot be checked",
    "Kandinsky5T2VPipeline": "its rotary embedding rounds to bfloat16 in every dtype, so gradients cannot be checked",
    "Flux2KleinKVPipeline": "it keeps the keys and values of its reference pictures from step to step",
    "QwenImage21Pipeline": "it keeps keys and values from step to step, and has no rule for the norm as Qwen-Image has",
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family that lists the pipeline's class; ValueError, with the known ones or the reason, where none does."""
    if isinstance(pipe, str | Path):
        raise UserError(f"{str(pipe)!r} is the name of a model: load it first, as in pipe = load_model({str(pipe)!r})")
    name = type(pipe).__name__
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    if name in REFUSED:
        raise UserError(f"no family for {name}: {REFUSED[name]}")
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise UserError(f"no family for {name}; known pipelines: {known}")
