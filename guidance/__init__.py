"""Guidance for diffusion models: what a sampler follows at each step.

from guidance.attach import attach  # on a diffusers pipeline
from guidance.guided import guided  # in our own loop
from guidance.methods import CFG, GUIDANCE
"""

__distribution__ = "difftune"
