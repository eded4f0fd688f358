"""The settings of every recipe. Nothing heavy is imported here, so that the command line's --help is fast."""

from dataclasses import dataclass, field

from difftune.configs.fields import documented
from difftune.configs.training import TrainingConfig


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
