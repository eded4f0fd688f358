"""The settings of every recipe. Nothing heavy is imported here, so that the command line's --help is fast."""

import ast
import inspect
from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal


def documented(config: type) -> type:
    """The dataclass, where `metadata["help"]` of each field is the docstring below it, or below the one it replaces."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {f.name: f.metadata["help"] for base in reversed(config.__mro__[1:-1]) for f in fields(base)}
    texts |= {
        name.target.id: ast.literal_eval(text.value)
        for name, text in pairwise(tree.body)
        if isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name) and isinstance(text, ast.Expr)
    }
    for f in fields(config):
        f.metadata = MappingProxyType({**f.metadata, "help": texts[f.name]})
    return config


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """What every recipe that trains a model is told."""

    model: str = "tiny"
    """An embedded model (tiny, tiny-turbo), a folder in diffusers' format, or a model's id on the hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """What to raise: NAME or NAME=WEIGHT, one or several; their weighted sum."""
    output_dir: str = "runs/train"
    """Folder of the run; it must be empty, unless the run is resumed."""
    prompts: str = "shapes"
    """Training prompts: a text file with one per line; "shapes" or "shapes:CATEGORY", captions of the world without
    ShapeEval's; "animals"; or "dataset:NAME" or "dataset:NAME:COLUMN", a data set of the hub or of a folder or file."""
    seed: int = 0
    """Of the LoRA's first weights, the prompts, the noise, and all that a recipe draws."""
    max_train_steps: int = 100
    """Optimiser steps."""
    train_batch_size: int = 8
    """Images per process and backward pass."""
    gradient_accumulation_steps: int = 1
    """Backward passes per optimiser step."""

    num_inference_steps: int = 25
    """Steps of the sampler."""
    sampler: str = "euler"
    """Sampler of the images that are trained on; euler is DDIM."""
    guidance: str = "cfg"
    """Guidance method of the sampler, in training as in use."""
    guidance_scale: float | None = None
    """Short for guidance_options["scale"]; None is 5 for cfg, and the own default of any other method."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the guidance method."""
    enable_xformers_memory_efficient_attention: bool = False
    """Let the network attend by xformers, if a probe on this GPU shows it no slower than SDPA, the default."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, and stop where there is none."""

    full_finetuning: bool = False
    """Train every weight of the denoiser, in float32, instead of a LoRA; a learning rate near 1e-5 is usual then."""
    lora_layers: str = "attention"
    """Layers with a LoRA: "attention", or "attention+ff+conv" with the feed-forward, projection, time and convolution
    layers."""
    rank: int = 4
    """Rank of the LoRA."""
    lora_alpha: int | None = None
    """The LoRA's update is scaled by lora_alpha / rank; None is rank, a scale of 1."""
    lora_dropout: float = 0.0
    """Probability that an input of a LoRA layer is dropped in training."""

    optimizer: str = "adamw"
    """adamw, adamw8bit (by bitsandbytes, an extra), or lion."""
    learning_rate: float = 1e-3
    """Of the optimiser, after the warm-up."""
    lr_scheduler: str = "constant_with_warmup"
    """Shape of the learning rate over the optimiser steps, a name of diffusers.optimization."""
    lr_warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """Decay of the optimiser's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients, and of Lion's mean of gradients."""
    adam_weight_decay: float = 1e-4
    """Weight decay, a share of learning_rate per step."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's mean of squared gradients."""
    max_grad_norm: float = 1.0
    """The gradient's norm over all weights is clipped to this."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, of this decay at most, and save it in their place; None keeps
    none."""
    max_skipped_steps: int = 10
    """Optimiser steps that a run may skip because a reward or a gradient was not finite; one more ends it."""
    mixed_precision: str = "no"
    """Precision of the frozen networks: "no" (float32), "bf16" or "fp16". The LoRA is always float32."""

    checkpointing_steps: int = 50
    """Optimiser steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept, the newest; None keeps all."""
    resume_from_checkpoint: str | None = None
    """The word "latest", or a checkpoint's folder: go on from there, exactly as if the run had not been interrupted."""
    report_to: str = "none"
    """A tracker of accelerate ("tensorboard", "wandb", ...) beside metrics.jsonl."""

    validation_steps: int | None = None
    """Optimiser steps between validations, which draw the same images each time; None makes none."""
    validation_prompts: str = "shapeeval"
    """Prompts of the validation: a text file, or "shapeeval", a few of each category of ShapeEval."""
    num_validation_images: int = 12
    """Images of a validation: the prompts in order, over again if they are fewer, each with a seed of its own."""
    validation_reward: str | None = None
    """A held-out reward, which is not trained on: it chooses the best checkpoint. None: the trained reward does."""
    early_stop: bool = False
    """Stop when the held-out reward falls while the trained one rises, by the curves of the validations."""


@documented
@dataclass(frozen=True)
class RewardGradientConfig(TrainingConfig):
    """What every recipe that differentiates a reward through the sampler is told."""

    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """What to raise: NAME or NAME=WEIGHT, one or several; their weighted sum. Each must be differentiable."""
    sampler: str = "euler"
    """Sampler that is differentiated; euler is DDIM."""
    memory_budget: str | None = None
    """Bytes of the device that the run may take, weights included, as in 6GiB: block checkpointing and the images
    at a time are chosen to fit. None: no limit, and nothing is measured."""
    offload: bool = False
    """Let the latents that wait for the backward pass do so in the host's memory; on a CPU they do in any case."""
    loss_coeff: float = 1.0
    """Multiplies the loss of the rewards. AdamW does not feel it; the clip, kl_coeff and float16's range do."""
    kl_coeff: float = 0.0
    """Weight of the divergence from the model that training began with, in nats per latent element; 0 leaves it out."""


@documented
@dataclass(frozen=True)
class AlignPropConfig(RewardGradientConfig):
    """AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler
    (https://arxiv.org/abs/2310.03739)."""

    output_dir: str = "runs/alignprop"
    seed: int = 0
    """Of the LoRA's first weights, the prompts, the noise and the truncation."""
    gradient: str | None = None
    """A mode of the engine for every optimiser step (full, checkpoint, revolve:8, truncated:10[:STYLE], adjoint:METHOD,
    reversible:METHOD, lean); None truncates as the settings below say."""
    truncation: str = "suffix"
    """Which sampler steps carry gradient: "suffix", the last K, as in the paper; or "bernoulli_linear", each by itself,
    step i of T with probability (i + 1) / (T + 1), as in the paper's code."""
    truncation_min: int = 1
    """Least K: the number of last sampler steps that carry gradient."""
    truncation_max: int = 10
    """Greatest K, at most num_inference_steps. K is uniform between the two, drawn once per optimiser step."""


@documented
@dataclass(frozen=True)
class DraftConfig(RewardGradientConfig):
    """DRaFT: fine-tune a LoRA on a differentiable reward, through the last K sampler steps
    (https://arxiv.org/abs/2309.17400)."""

    output_dir: str = "runs/draft"
    truncation_steps: int = 1
    """K: the number of last sampler steps that carry gradient."""
    low_variance_copies: int = 0
    """DRaFT-LV: the last step alone carries gradient, over this many fresh noises of its result; the paper has 2. 0 is
    DRaFT-K."""


@documented
@dataclass(frozen=True)
class ReflConfig(RewardGradientConfig):
    """ReFL: fine-tune a LoRA on a reward of a prediction made before the end (https://arxiv.org/abs/2304.05977)."""

    output_dir: str = "runs/refl"
    guidance: str = "none"
    """Guidance method of the sampler, in training as in use; the paper's training has none."""
    truncation_min: int = 1
    """Least number of steps before the end at which the clean image is predicted."""
    truncation_max: int = 10
    """Greatest number of them, at most num_inference_steps; drawn uniformly, once per optimiser step."""
    reward_threshold: float = 2.0
    """The loss is relu(reward_threshold - reward): images above it are left alone. The paper's is 2, of ImageReward."""
    loss_coeff: float = 1e-3
    """Multiplies the loss of the rewards. AdamW does not feel it; the clip, kl_coeff and float16's range do."""


@documented
@dataclass(frozen=True)
class DrtuneConfig(RewardGradientConfig):
    """DRTune: fine-tune a LoRA on a reward, through steps all along the sampler (https://arxiv.org/abs/2405.00760)."""

    output_dir: str = "runs/drtune"
    truncation_steps: int = 5
    """K: the number of sampler steps that are trained, evenly spaced, the last one among them."""


@documented
@dataclass(frozen=True)
class DDPOConfig(TrainingConfig):
    """DDPO: fine-tune a LoRA on any reward by policy gradients of the sampler (https://arxiv.org/abs/2305.13301)."""

    output_dir: str = "runs/ddpo"
    num_inference_steps: int = 50
    sampler: str = "ancestral"
    """The sampler that has a log-probability, the only one: DDIM with eta, or the SDE of a flow."""
    eta: float | None = None
    """Noise of the sampler, above 0; None is DDPM's 1 of DDIM, and 0.7 of a flow's SDE."""
    learning_rate: float = 3e-4

    updates_per_round: int = 1
    """Optimiser steps on the images that the weights of the first have made, each step on its own share of them."""
    num_images_per_prompt: int = 1
    """Images of each prompt; from 2 on, a reward is compared with the mean of its prompt, not of the round."""
    per_prompt_stat_tracking: bool = False
    """A reward is compared with the mean and the deviation of its prompt's latest rewards, in this round and before."""
    per_prompt_stat_tracking_buffer_size: int = 32
    """Latest rewards of each prompt that these are taken of."""
    per_prompt_stat_tracking_min_count: int = 16
    """With fewer, mean and deviation are those of the round."""
    clip_range: float = 1e-4
    """How far the ratio of a step's probabilities may leave 1, the way its advantage points, and still be moved."""
    adv_clip_max: float = 5.0
    """Advantages are kept within this many standard deviations."""
    kl_weight: float = 0.0
    """Of a penalty, KL(policy || model before training) at each step; above 0, its network calls are added."""


@documented
@dataclass(frozen=True)
class D3POConfig(TrainingConfig):
    """D3PO: fine-tune a LoRA on preferences between sampled images, step by step (https://arxiv.org/abs/2311.13231)."""

    output_dir: str = "runs/d3po"
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """The judge, if there are no labels: NAME or NAME=WEIGHT, one or several; it prefers the greater weighted sum."""
    labels: str | None = None
    """Choices of a person, a file of `difftune label` on images of `difftune sample --eta`; None: the reward judges."""
    num_inference_steps: int = 20
    sampler: str = "ancestral"
    """The sampler that has a log-probability, the only one: DDIM with eta, or the SDE of a flow."""
    eta: float | None = None
    """Noise of the sampler, above 0; None is DDPM's 1 of DDIM, and 0.7 of a flow's SDE."""
    learning_rate: float = 3e-5

    num_images_per_prompt: int = 2
    """Images of each prompt, from one first noise; every two of them are a pair. 2 with labels."""
    beta: float = 0.1
    """Weight of the log-ratios in the preference's log-odds; the greater, the stronger a pair is pulled apart."""
    clip_range: float = 0.1
    """The ratio of a step's probabilities to those before training is kept within 1 - clip_range and 1 + clip_range."""


@documented
@dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """What recipes that train on denoising errors of preferred images are told."""

    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """The judge, if there are no labels: NAME or NAME=WEIGHT, one or several; it prefers the greater weighted sum."""
    labels: str | None = None
    """Choices of a person, a file of `difftune label`; None: images are made, and the reward judges."""
    updates_per_round: int = 1
    """Optimiser steps on the same images, each at other noise levels, before the model makes new ones."""
    num_images_per_prompt: int = 2
    """Images that are made of each prompt."""
    rank: int = 8
    learning_rate: float = 1e-5
    adam_weight_decay: float = 1e-2


@documented
@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Diffusion-DPO: fine-tune a LoRA on pairs, a better and a worse image (https://arxiv.org/abs/2311.12908)."""

    output_dir: str = "runs/dpo"
    train_batch_size: int = 4
    """Pairs per process and backward pass."""
    num_images_per_prompt: int = 2
    """Images that are made for each pair, which is the best and the worst of them."""
    beta: float = 5000.0
    """Weight of the difference of denoising errors, which are means over the latent's elements."""


@documented
@dataclass(frozen=True)
class KTOConfig(PreferenceConfig):
    """Diffusion-KTO: fine-tune a LoRA on images that are good or bad, each by itself
    (https://arxiv.org/abs/2404.04465)."""

    output_dir: str = "runs/kto"
    num_images_per_prompt: int = 2
    """Images that are made of each prompt; those above the mean reward of their prompt are good."""
    beta: float = 1000.0
    """Weight of the gain in denoising error, a mean over the latent's elements."""
    desirable_weight: float = 1.0
    """Of the good images' loss."""
    undesirable_weight: float = 1.0
    """Of the bad images' loss."""


@documented
@dataclass(frozen=True)
class DROConfig(PreferenceConfig):
    """DRO: fine-tune a LoRA to denoise good images better and bad ones worse (https://arxiv.org/abs/2503.22677)."""

    output_dir: str = "runs/dro"
    train_batch_size: int = 4
    """Pairs per process and backward pass."""
    num_images_per_prompt: int = 2
    """Images that are made for each pair, which is the best and the worst of them."""
    learning_rate: float = 5e-6
    max_loser_loss: float | None = None
    """A bad image's denoising error is not raised beyond this; None: without bound, as the loss itself is."""


@documented
@dataclass(frozen=True)
class PSOConfig(TrainingConfig):
    """PSO: fine-tune a LoRA of a few-step model on pairs, at its own steps (https://arxiv.org/abs/2410.03190)."""

    model: str = "tiny-turbo"
    """A model distilled to a few steps: tiny-turbo, a folder in diffusers' format, or a model's id on the hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """The judge, if there are no images: NAME or NAME=WEIGHT, one or several; it prefers the greater weighted sum."""
    images: str | None = None
    """A folder of pictures of a style or a concept, captioned by metadata.jsonl or by text files beside them, which are
    preferred to what the model makes of their captions (offline). None: images are made, the reward judges (online)."""
    caption: str | None = None
    """Of the pictures that have none."""
    num_negatives: int = 4
    """Images that the model makes of each picture's caption before training (offline)."""
    output_dir: str = "runs/pso"
    train_batch_size: int = 8
    """Per process and backward pass: images online, pictures offline."""
    num_images_per_prompt: int = 2
    """Trajectories of each prompt, of which the best and the worst are a pair (online)."""

    num_inference_steps: int = 4
    """Steps of the sampler, which are those that the model was distilled to."""
    sampler: str = "ancestral"
    """The sampler that has a log-probability, the only one; `transition` says how it adds noise."""
    transition: str | None = None
    """How a step adds noise: "lcm", all of it is new (LCM, DMD2, tiny-turbo), or "ancestral", Euler's (SD-Turbo,
    SDXL-Turbo); None is lcm for a pipeline with an LCM scheduler, else ancestral."""
    guidance: str = "none"
    """Guidance method; distilled few-step models want none."""
    rank: int = 32
    """Rank of the LoRA."""
    learning_rate: float = 1e-5
    """Of the optimiser, after the warm-up."""
    adam_weight_decay: float = 1e-6
    """Weight decay, a share of learning_rate per step."""

    beta: float | None = None
    """Weight of the margin in the preference's log-odds; None is 50 online, and 5000 offline, where the margin is half
    a difference of denoising errors."""
    clip_range: float = 0.1
    """The ratio of a step's probabilities to those before training is kept within 1 - clip_range and 1 + clip_range
    (online)."""


@documented
@dataclass(frozen=True)
class DragonConfig(TrainingConfig):
    """DRAGON: fine-tune a LoRA on sets of better and of worse images (https://arxiv.org/abs/2504.15217)."""

    objective: str = "instance"
    """What to raise: instance, the rewards; item-frechet or item-mmd, each image's likeness to exemplars; frechet or
    mmd, the likeness of the set of images to them; vendi, the set's diversity."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """What "instance" raises: NAME or NAME=WEIGHT, one or several; their weighted sum. It needs no gradient."""
    exemplars: str | None = None
    """A folder of pictures, or a text file with one text per line: what images are to be like."""
    encoder: str = "tiny-clip"
    """A reward with towers for pictures and texts, which gives the features of a distribution; item-frechet takes the
    model's VAE."""
    shrinkage: float = 0.1
    """Of the covariances of a Fréchet distance towards a sphere, in [0, 1]."""
    feature_dims: int = 32
    """Principal components of the exemplars that the Fréchet distance of a set looks at."""
    output_dir: str = "runs/dragon"

    pairs_per_round: int = 64
    """Prompts of a round, of each of which two images are made, per process."""
    updates_per_round: int = 16
    """Optimiser steps on a round; each takes train_batch_size pairs of it, all in turn."""
    sweeps: int = 3
    """At most so many times are the pairs of a round gone over to find the sets."""
    loss: str = "dpo"
    """How sets become an update: dpo, on pairs, or kto, on single images."""
    beta: float | None = None
    """Weight of the differences of denoising errors, which are means over the latent's elements; None is 5000 for dpo
    and 1000 for kto."""
    train_batch_size: int = 8
    """Pairs per process and backward pass."""
    num_win_rate_images: int = 64
    """Images of new prompts, before and after training, that the win rate compares; 0: none."""
    rank: int = 8
    """Rank of the LoRA."""
    learning_rate: float = 1e-5
    """Of the optimiser, after the warm-up."""
    adam_weight_decay: float = 1e-2
    """Weight decay, a share of learning_rate per step."""


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
