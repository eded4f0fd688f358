"""The settings of search at inference."""

from dataclasses import dataclass, field
from typing import Any, Literal

from difftune.configs.fields import Config, documented
from solvers.ranges import Count, NotNegative, Seed, Steps


@documented
@dataclass(frozen=True)
class SearchConfig(Config):
    """Search at inference: particles or a tree that raise a reward, the model as it is."""

    method: str = "dts-star"
    """Search method: one of `difftune methods`, where best-of-n and importance are the baselines."""
    prompt: list[str] = field(default_factory=list)
    """Prompts, searched side by side; none changes another's result."""
    model: str = "tiny"
    """Model to draw with: tiny, tiny-turbo, a folder in diffusers' format, or an id on the Hub."""
    lora: str | None = None
    """Folder of a training run, whose LoRA is loaded."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given. tds needs differentiable ones."""
    reward_scaling: Literal["none", "range"] = "none"
    """What each reward is divided by before they are summed: none, nothing; range, the width of its nominal range. A
    scale that moves would make the rewards of two moments no longer comparable."""
    output_dir: str = "runs/search"
    """Folder of the result. It must be empty, unless the search is resumed."""
    nfe_budget: Count = 800
    """Network evaluations of each prompt, never exceeded; under CFG a step costs two."""
    reward_budget: Count | None = None
    """Reward calls of each prompt, never exceeded. If not given: no limit."""
    seed: Seed = 0
    """Seed of the first prompt; prompt i has seed + i."""
    setting: list[str] | None = None
    """Settings of the method itself, as in inverse_temperature=5."""
    expert: list[str] | None = None
    """Further experts of fkc, each with a prompt; --setting exponents=cond:1,NAME:1 gives their powers."""

    num_inference_steps: Steps = 25
    """Sampler steps of an image."""
    eta: NotNegative = 1.0
    """Noise of the sampler: 1 is DDPM; 0, DDIM, is for best-of-n and importance alone."""
    guidance: str = "cfg"
    """Guidance method inside the search: one of `difftune methods`."""
    guidance_scale: float | None = None
    """Short for --guidance.scale. If not given: the method's own default."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """A setting of the guidance method, as in --guidance.eta 0.5."""
    embedded_guidance: float | None = None
    """Guidance scale that is told to a network distilled over scales (FLUX.1-dev, LCM), which needs one; no other takes
    it."""
    memory_budget: str | None = None
    """Bytes of the device that the search may take, weights included, as in 6GiB. If not given: all rows run at
    once."""
    decode_batch: Count = 1
    """Images that are decoded at a time: the decoder's memory does not grow with the batch."""
    enable_vae_tiling: bool = False
    """Decode a picture larger than the VAE's tile in overlapping tiles, whose seams are blended: less memory, and not
    quite the same picture."""
    compile: bool = False
    """Compile the blocks of the network and of the decoder by torch: each kind and shape once, in the first steps. Not
    quite the same bits."""
    resume_from_checkpoint: Literal["latest"] | None = None
    """Go on with the search that the output folder holds, exactly as if it had not been interrupted: the word latest.
    The budgets may be larger than they were."""
