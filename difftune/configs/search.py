"""The settings of search at inference."""

from dataclasses import dataclass, field
from typing import Any

from difftune.configs.fields import documented


@documented
@dataclass(frozen=True)
class SearchConfig:
    """Search at inference: particles or a tree that raise a reward, the model as it is."""

    method: str = "dts-star"
    """fkc, fk, tds, svdd, beam, dts, dts-star, or the baselines best-of-n and importance."""
    prompt: list[str] = field(default_factory=list)
    """One or more prompts, searched side by side; none changes another's result."""
    model: str = "tiny"
    """An embedded model (tiny, tiny-turbo), a folder in diffusers' format, or a model's id on the hub."""
    lora: str | None = None
    """Folder of a training run, whose LoRA is loaded."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """What to raise: NAME or NAME=WEIGHT, one or several; their weighted sum. tds needs differentiable ones."""
    output_dir: str = "runs/search"
    """Folder of the result; it must be empty, unless resume is set."""
    budget: int = 800
    """Network evaluations of each prompt, never exceeded; under CFG a step costs two."""
    reward_budget: int | None = None
    """Reward calls of each prompt, never exceeded; None is no limit."""
    seed: int = 0
    """Of the first prompt's randomness: the i-th prompt's is that of seed + i."""
    setting: list[str] | None = None
    """KEY=VALUE, one or several: the method's own settings, as in inverse_temperature=5."""
    expert: list[str] | None = None
    """NAME=PROMPT, one or several: further experts of fkc; exponents=cond:1,NAME:1 is the setting with their powers."""

    num_inference_steps: int = 25
    """Steps of the sampler."""
    eta: float = 1.0
    """Noise of the sampler: 1 is DDPM; 0, DDIM, is for best-of-n and importance alone."""
    guidance: str = "cfg"
    """Guidance method inside the search."""
    guidance_scale: float | None = None
    """Short for guidance_options["scale"]; None is 5 for cfg, and the own default of any other method."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the guidance method."""
    memory_budget: str | None = None
    """Bytes of the device that the search may take, weights included, as in 6GiB; None runs all rows at once."""
    resume: bool = False
    """Go on with the search that output_dir holds, exactly as if it had not been interrupted; the budgets may be
    larger than they were."""
