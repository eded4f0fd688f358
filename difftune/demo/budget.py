"""All that the demo's stages are told: the one place to change it."""

from dataclasses import dataclass, field
from typing import Any


def recipe_options() -> dict[str, Any]:
    """The averaged weights hold less of the gradients' noise than the last ones."""
    return {"truncation_steps": 1, "normalize_reward_gradients": True, "ema_decay": 0.98, "decode_batch": 8}


@dataclass(frozen=True)
class Budget:
    """The size of each stage; all of it in at most four minutes on two cores that do nothing else."""

    model: str = "tiny"
    turbo: str = "tiny-turbo"
    judge: str = "tiny-clip"  # the reward that all stages report, and training follows
    smoothed: str = "smooth[reward=tiny-clip,shifts=4,pixels=3]"  # what ReNO follows
    steps: int = 15  # of the sampler, in the first stage
    guidance_scale: float = 2.0
    prompts_per_category: int = 10  # of ShapeEval, in the first stage
    guidance_images: int = 2  # of each prompt, in the first stage
    recipe: str = "draft"
    recipe_options: dict[str, Any] = field(default_factory=recipe_options)
    train_guidance: str = "none"
    train_sampler_steps: int = 1  # of `turbo`: its whole run carries gradient, and an update costs little
    train_steps: int = 240
    train_batch: int = 8
    held_out_prompts_per_category: int = 30  # of ShapeEval, all of it
    held_out_images: int = 2  # of each prompt, in the second stage
    reno_prompts_per_category: int = 4
    reno_steps: int = 1
    reno_iterations: int = 25
    search_method: str = "dts-star"
    search_prompts_per_category: int = 3  # of ShapeEval-hard
    search_sampler_steps: int = 10
    search_nfe: int = 400  # of each prompt
