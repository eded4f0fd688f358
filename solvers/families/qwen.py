"""Qwen-Image, which `attach` alone can guide."""

from solvers.families.after import NORM
from solvers.families.family import TEXT_INPUTS, sequential_family
from solvers.families.patches import SKIPPED_JOINT

QWEN_INPUTS = (*TEXT_INPUTS, "encoder_hidden_states_mask", "guidance")


QWEN = sequential_family(
    name="qwen",
    patches=SKIPPED_JOINT,
    pipelines=("QwenImagePipeline",),
    batch_first=QWEN_INPUTS,
    grid=lambda arguments: tuple(arguments["img_shapes"][0][0][1:]),
    after=NORM,
)
