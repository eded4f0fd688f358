"""All that the demo's stages are told: the one place to change it."""

from dataclasses import dataclass, field
from typing import Any


def drtune_options() -> dict[str, Any]:
    return {"truncation_steps": 5, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Budget:
    """The size of each stage; all of it in at most four minutes on two cores that do nothing else."""

    model: str = "tiny"
    turbo: str = "tiny-turbo"
    judge: str = "tiny-clip"  # the reward that all stages report
    smoothed: str = "smooth[reward=tiny-clip,shifts=4,pixels=3]"  # what training and ReNO follow
    steps: int = 15  # of the sampler, in the first stage
    guidance_scale: float = 2.0
    prompts_per_category: int = 10  # of ShapeEval, in the first two stages
    guidance_images: int = 2  # of each prompt, in the first stage
    recipe: str = "drtune"
    recipe_options: dict[str, Any] = field(default_factory=drtune_options)
    train_guidance: str = "none"  # what guidance does is there to be learnt, and the gradient has less noise
    train_sampler_steps: int = 10
    train_steps: int = 40
    train_batch: int = 8
    held_out_images: int = 2  # of each prompt, in the second stage
    reno_prompts_per_category: int = 4
    reno_steps: int = 1
    reno_iterations: int = 25
    search_method: str = "dts-star"
    search_prompts_per_category: int = 3  # of ShapeEval-hard
    search_sampler_steps: int = 10
    search_nfe: int = 400  # of each prompt
