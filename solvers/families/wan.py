"""Wan, a family of video models, which `attach` alone can guide."""

from solvers.families.family import TEXT_INPUTS, sequential_family
from solvers.families.patches import SKIPPED

WAN_INPUTS = (*TEXT_INPUTS, "encoder_hidden_states_image")


WAN = sequential_family(
    name="wan",
    patches=SKIPPED,
    pipelines=("WanPipeline",),
    denoisers=("transformer", "transformer_2"),
    batch_first=WAN_INPUTS,
    prepare="guidance_scale > 1",
)
