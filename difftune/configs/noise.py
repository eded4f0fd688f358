"""The settings of noise optimisation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from difftune.configs.fields import Config, documented
from solvers.ranges import Count, Many, NotNegative, Positive, Seed, Side, Steps


@documented
@dataclass(frozen=True)
class RenoConfig(Config):
    """ReNO: optimise the initial noise of one prompt or several on a reward (https://arxiv.org/abs/2406.04312)."""

    prompt: list[str] = field(default_factory=list)
    """Prompts; the noise of each is optimised by itself."""
    model: str = "tiny-turbo"
    """Model to draw with: tiny-turbo, tiny, a folder in diffusers' format, or an id on the Hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given. Differentiable, if the optimiser needs it."""
    reward_scaling: Literal["none", "range"] = "none"
    """What each reward is divided by before they are summed: none, nothing; range, the width of its nominal range. A
    scale that moves would make the rewards of two iterations no longer comparable."""
    output_dir: str = "runs/reno"
    """Folder of the result. It must be empty, unless the run is resumed."""
    iterations: Count = 50
    """Images made for each prompt; the noise is updated after each but the last."""
    seed: Seed = 0
    """Seed of the first noise; noise i has seed + i, whatever the batch."""
    batch_size: Count = 8
    """Noises optimised at once; the results do not depend on it."""

    num_inference_steps: Steps = 1
    """Sampler steps of an image."""
    sampler: str = "euler"
    """Sampler that is differentiated: one of `difftune methods`; euler is DDIM. A stochastic sampler's own noise is
    drawn once and kept."""
    guidance: str = "none"
    """Guidance method: one of `difftune methods`; distilled few-step models want none."""
    guidance_scale: float | None = None
    """Short for --guidance.scale. If not given: the method's own default."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """A setting of the guidance method, as in --guidance.eta 0.5."""
    gradient: str | None = None
    """Mode of the engine: full, checkpoint, revolve:8, truncated:10[:STYLE], adjoint:METHOD, reversible:METHOD or lean.
    If not given: checkpoint, or what the memory budget has room for."""
    memory_budget: str | None = None
    """Bytes of the device that the run may take, weights included, as in 6GiB: the mode, block checkpointing and the
    images at a time are chosen to fit. If not given: no limit, and nothing is measured."""
    offload: bool = False
    """Keep the latents that wait for the backward pass in the host's memory; on a CPU they are there in any case."""
    decode_batch: Count = 1
    """Images that are decoded, and rewarded under a gradient, at a time: the decoder's memory does not grow with the
    batch."""
    enable_vae_tiling: bool = False
    """Decode a picture larger than the VAE's tile in overlapping tiles, whose seams are blended: less memory, and not
    quite the same picture."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attend by xformers, if a probe on this GPU shows that it is no slower than torch's own attention."""
    compile: bool = False
    """Compile the blocks of the network and of the decoder by torch: each kind and shape once, in the first steps. Not
    quite the same bits."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, and stop if an operation has none."""

    optimizer: str = "sgd"
    """Optimiser: sgd (Nesterov), adam or lbfgs; for rewards without gradients neighbours, spsa or cma. Options stand in
    brackets, as in spsa[candidates=8]."""
    learning_rate: NotNegative | None = None
    """Learning rate. If not given: the paper's for its model, else 5 sqrt(D / 16384) for D latent elements, or the
    optimiser's own."""
    grad_clip: Positive | None = None
    """The norm of each prompt's gradient is clipped to this. If not given: the optimiser's own, 0.1 for sgd."""
    variables: Literal["noise", "prompt", "both"] = "noise"
    """What is optimised: the noise, the prompt's embedding, or both."""
    regularization_weight: NotNegative = 0.01
    """Weight of the regulariser."""
    regularizer: Literal["chi", "spectral", "dno"] = "chi"
    """Minus the log density that Gaussian noise gives to the noise's norm (chi), to its norm and spectrum
    (spectral), or to its blocks (dno)."""
    held_out: str | None = None
    """Reward that is not optimised: it is reported beside the one that is, with the iteration where they part."""
    patience: Count | None = None
    """Iterations without a better image after which a prompt is finished. If not given: never."""
    target: float | None = None
    """Total reward at which a prompt is finished. If not given: never."""
    seeds_per_prompt: Many = 1
    """Noises that are optimised for each prompt."""
    start: str | None = None
    """Where the noise begins: a noise.safetensors, or a picture, inverted under the guidance. If not given: it is
    drawn."""
    inversion_steps: Steps = 50
    """Steps of that inversion."""
    max_distance: NotNegative | None = None
    """Largest distance of the noise, and of the embedding, from where they began, as a share of the norm there. If
    not given: no limit."""
    setting: Literal["sd-turbo", "sdxl-turbo", "pixart-dmd", "hyper-sdxl", "flux-schnell"] | None = None
    """The paper's settings for a model. If not given: by the model's id."""
    embedded_guidance: float | None = None
    """Guidance scale that is told to a network distilled over scales (LCM); no other takes one."""
    height: Side | None = None
    """Height of the pictures in pixels. If not given: the paper's for its model, else the model's own."""
    width: Side | None = None
    """Width of the pictures in pixels. If not given: as for the height."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the networks; no is float32. The noise and the regulariser are float32 or better."""

    animation: Literal["gif", "webp", "none"] = "gif"
    """How the path of each picture is shown."""
    checkpointing_steps: Count | None = None
    """Iterations between checkpoints. If not given: nothing is written before the end."""
    resume_from_checkpoint: Literal["latest"] | None = None
    """Go on from the output folder's newest checkpoint, exactly as if the run had not been interrupted: the word
    latest."""
