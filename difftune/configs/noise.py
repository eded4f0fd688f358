"""The settings of noise optimisation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from difftune.configs.fields import documented


@documented
@dataclass(frozen=True)
class RenoConfig:
    """ReNO: optimise the initial noise of one prompt or several on a reward (https://arxiv.org/abs/2406.04312)."""

    prompt: list[str] = field(default_factory=list)
    """One or more prompts; the noise of each is optimised by itself."""
    model: str = "tiny-turbo"
    """An embedded model (tiny, tiny-turbo), a folder in diffusers' format, or a model's id on the hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """What to raise: NAME or NAME=WEIGHT, one or several; their weighted sum. Differentiable, if the optimizer needs
    it."""
    output_dir: str = "runs/reno"
    """Folder of the result; it must be empty, unless the run is resumed."""
    iterations: int = 50
    """Images made for each prompt; the noise is updated between them, one time less."""
    seed: int = 0
    """Of the first noise: the i-th one's is drawn with seed + i, whatever the batch."""
    batch_size: int = 8
    """Noises optimised at once; the results do not depend on it."""

    num_inference_steps: int = 1
    """Steps of the sampler."""
    sampler: str = "euler"
    """Sampler that is differentiated; euler is DDIM. The noise of a stochastic one is drawn once and stays."""
    guidance: str = "none"
    """Guidance method; distilled few-step models want none."""
    guidance_scale: float | None = None
    """Short for guidance_options["scale"]; None is 5 for cfg, and the own default of any other method."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the guidance method."""
    gradient: str | None = None
    """A mode of the engine (full, checkpoint, revolve:8, truncated:10[:STYLE], adjoint:METHOD, reversible:METHOD,
    lean); None is checkpoint, or what memory_budget has room for."""
    memory_budget: str | None = None
    """Bytes of the device that the run may take, weights included, as in 6GiB: the mode, block checkpointing and the
    images at a time are chosen to fit. None: no limit, and nothing is measured."""
    offload: bool = False
    """Let the latents that wait for the backward pass do so in the host's memory; on a CPU they do in any case."""
    enable_xformers_memory_efficient_attention: bool = False
    """Let the network attend by xformers, if a probe on this GPU shows it no slower than SDPA, the default."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, and stop where there is none."""

    optimizer: str = "sgd"
    """sgd (Nesterov), adam or lbfgs; without gradients neighbours, spsa or cma. With options: "spsa[candidates=8]"."""
    learning_rate: float | None = None
    """Of the optimizer; None is the paper's for its model, else 5 sqrt(D / 16384) for D latent elements, or the
    optimizer's own."""
    grad_clip: float | None = None
    """The gradient's norm, of each prompt by itself, is clipped to this; None is the optimizer's own, 0.1 for sgd."""
    variables: Literal["noise", "prompt", "both"] = "noise"
    """What is optimised: the noise, the prompt's embedding, or both."""
    regularization_weight: float = 0.01
    """Weight of the regularizer."""
    regularizer: str = "chi"
    """Minus a log density of Gaussian noise: of its norm (chi), its spectrum too (spectral), or of its blocks (dno)."""
    normalize: bool = False
    """Divide each reward by the width of its nominal range, so that weights compare."""
    held_out: str | None = None
    """A reward that is not optimised: it is reported beside the one that is, with the iteration where they part."""
    patience: int | None = None
    """Iterations without a better image after which a prompt is finished; None: never."""
    target: float | None = None
    """Total reward at which a prompt is finished; None: never."""
    seeds_per_prompt: int = 1
    """Noises that are optimised for each prompt."""
    start: str | None = None
    """Where the noise begins: a noise.safetensors, or a picture, inverted under the guidance; None draws it."""
    inversion_steps: int = 50
    """Steps of that inversion."""
    max_distance: float | None = None
    """The noise, and the embedding, stay this near to where they began, as a share of the norm there; None: free."""
    setting: str | None = None
    """The paper's settings for a model (sd-turbo, sdxl-turbo, pixart-dmd, hyper-sdxl, flux-schnell); None goes by the
    model's id."""
    embedded_guidance: float | None = None
    """Guidance scale that is told to a network distilled over scales (LCM); no other takes one."""
    height: int | None = None
    """Of the pictures, in pixels; None is the paper's for its model, else the model's own."""
    width: int | None = None
    """As height."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the networks: "no" (float32), "bf16" or "fp16". Noise and regularizer are float32 or better."""

    animation: Literal["gif", "webp", "none"] = "gif"
    """How the path of each picture is shown."""
    checkpointing_steps: int | None = None
    """Iterations between checkpoints; None writes nothing before the end."""
    resume_from_checkpoint: str | None = None
    """The word "latest": go on from the output folder's checkpoints, exactly as if the run had not been interrupted."""
