"""The settings of every recipe. Nothing heavy is imported here, so that the command line's --help is fast."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from difftune.configs.fields import documented
from difftune.configs.training import TrainingConfig
from solvers.ranges import Count, Many, NotNegative, Positive, Range, Seed, Share, Steps, Whole


@documented
@dataclass(frozen=True)
class RewardGradientConfig(TrainingConfig):
    """What every recipe that differentiates a reward through the sampler is told."""

    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given. Each must be differentiable."""
    sampler: str = "euler"
    """Sampler that is differentiated: one of `difftune methods`; euler is DDIM."""
    memory_budget: str | None = None
    """Bytes of the device that the run may take, weights included, as in 6GiB: block checkpointing and the images at a
    time are chosen to fit. If not given: no limit, and nothing is measured."""
    offload: bool = False
    """Keep the latents that wait for the backward pass in the host's memory; on a CPU they are there in any case."""
    loss_coeff: NotNegative = 1.0
    """Factor of the reward's loss. AdamW does not feel it; the clip, kl_coeff and float16's range do."""
    kl_coeff: NotNegative = 0.0
    """Weight of the divergence from the model before training, in nats per latent element; 0 leaves it out."""
    normalize_gradient: bool = False
    """Bring the gradient of every update to the norm max_grad_norm, as the clip does with longer ones: an update of few
    trained sampler steps then weighs as much as one of many in AdamW's means."""
    normalize_reward_gradients: bool = False
    """Bring each image's gradient of the reward, in its latent, to norm 1: else a few images with steep rewards
    outweigh all others of a batch."""


@documented
@dataclass(frozen=True)
class AlignPropConfig(RewardGradientConfig):
    """AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler
    (https://arxiv.org/abs/2310.03739)."""

    output_dir: str = "runs/alignprop"
    seed: Seed = 0
    """Seed of the first weights, the prompts, the noise and the truncation."""
    gradient: str | None = None
    """Mode of the engine for every optimiser step: full, checkpoint, revolve:8, truncated:10[:STYLE], adjoint:METHOD,
    reversible:METHOD or lean; or a surrogate, drawn anew for each: flowbp[active=4], leapalign[alpha=.3] or
    direct-align. If not given: truncated as the settings below say."""
    truncation: Literal["suffix", "gaussian", "bernoulli_linear"] = "suffix"
    """Which sampler steps carry gradient: suffix, the last K, K uniform, as in the paper; gaussian, the last K,
    K = T - N(.84 T, .1 T), as in the authors' later code; or bernoulli_linear, each by itself, step i of T with
    probability (i + 1) / (T + 1), as in their first code and TRL."""
    truncation_min: Steps = 1
    """Least K of suffix, the number of last sampler steps that carry gradient."""
    truncation_max: Steps = 10
    """Greatest K of suffix, at most the sampler steps. K is uniform between the two, drawn once per optimiser step."""


@documented
@dataclass(frozen=True)
class DraftConfig(RewardGradientConfig):
    """DRaFT: fine-tune a LoRA on a differentiable reward, through the last K sampler steps
    (https://arxiv.org/abs/2309.17400)."""

    output_dir: str = "runs/draft"
    truncation_steps: Steps = 1
    """K: the number of last sampler steps that carry gradient."""
    low_variance_copies: Whole = 0
    """DRaFT-LV: only the last step carries gradient, over this many fresh noises of its result; the paper has 2. 0 is
    DRaFT-K."""


@documented
@dataclass(frozen=True)
class ReflConfig(RewardGradientConfig):
    """ReFL: fine-tune a LoRA on a reward of a prediction made before the end (https://arxiv.org/abs/2304.05977)."""

    output_dir: str = "runs/refl"
    guidance: str = "none"
    """Guidance method, in training as in use; the paper's training has none."""
    truncation_min: Steps = 1
    """Least number of steps before the end at which the clean image is predicted."""
    truncation_max: Steps = 10
    """Greatest number of them, at most the sampler steps; drawn uniformly, once per optimiser step."""
    reward_threshold: float = 2.0
    """The loss is relu(reward_threshold - reward): images above it are left alone. The paper's is 2, of ImageReward."""
    loss_coeff: NotNegative = 1e-3
    """Factor of the reward's loss. AdamW does not feel it; the clip, kl_coeff and float16's range do."""


@documented
@dataclass(frozen=True)
class DrtuneConfig(RewardGradientConfig):
    """DRTune: fine-tune a LoRA on a reward, through steps all along the sampler (https://arxiv.org/abs/2405.00760)."""

    output_dir: str = "runs/drtune"
    truncation_steps: Steps = 5
    """K: the number of sampler steps that are trained, evenly spaced, from an offset drawn for each optimiser step."""


@documented
@dataclass(frozen=True)
class AdjointMatchingConfig(TrainingConfig):
    """Adjoint matching: fine-tune a LoRA on a differentiable reward by regression on a lean adjoint
    (https://arxiv.org/abs/2409.08861)."""

    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given. Each must be differentiable."""
    output_dir: str = "runs/adjoint-matching"
    sampler: Literal["ancestral"] = "ancestral"
    """Memoryless sampler, the only one: DDPM's steps, of a flow too."""
    guidance: str = "none"
    """Guidance method of the images that are made; the regression has none."""
    learning_rate: Positive = 3e-4

    reward_multiplier: Positive = 100.0
    """Weight of the reward against the divergence from the model before training: the optimum is that model times
    exp(reward_multiplier * reward)."""
    steps_per_image: Many = 4
    """Sampler steps that an optimiser step is taken on, half of them from the first 60 %."""
    drop_quantile: Share = 0.9
    """Steps whose error is above a running mean of this quantile have no gradient; 1 keeps all."""


@documented
@dataclass(frozen=True)
class HypernoiseConfig(TrainingConfig):
    """HyperNoise: train a LoRA that moves the noise of a few-step model in one pass (https://arxiv.org/abs/2508.09968)."""

    model: str = "tiny-turbo"
    """Model whose noise is moved, distilled to a few steps: tiny-turbo, a folder in diffusers' format, or an id on the
    Hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given. Each must be differentiable."""
    output_dir: str = "runs/hypernoise"
    num_inference_steps: Steps = 1
    """Sampler steps of an image, all of which are differentiated."""
    guidance: str = "none"
    """Guidance method; distilled few-step models want none."""
    lora_layers: Literal["attention", "attention+ff+conv"] = "attention+ff+conv"
    """Layers with a LoRA: the attention, or also the feed-forward, projection, time and convolution layers."""
    learning_rate: Positive = 1e-3

    regularization_weight: NotNegative = 0.5
    """Weight of the mean square of what is added to the noise, per element."""


@documented
@dataclass(frozen=True)
class DDPOConfig(TrainingConfig):
    """DDPO: fine-tune a LoRA on any reward by policy gradients of the sampler (https://arxiv.org/abs/2305.13301).
    Its successor, with groups of images and fewer trained steps, is `difftune train grpo`."""

    output_dir: str = "runs/ddpo"
    num_inference_steps: Steps = 50
    sampler: Literal["ancestral"] = "ancestral"
    """Sampler with a log-probability, the only one: DDIM with eta, or the SDE of a flow."""
    eta: Positive | None = None
    """Noise of the sampler, above 0. If not given: DDPM's 1 for DDIM, and 0.7 for a flow's SDE."""
    learning_rate: Positive = 3e-4

    updates_per_round: Many = 1
    """Optimiser steps on the images of one round, each step on its own share of them."""
    num_images_per_prompt: Many = 1
    """Images of each prompt; from 2 on, a reward is compared with the mean of its prompt, not of the round."""
    per_prompt_stat_tracking: bool = False
    """Compare a reward with the mean and the deviation of its prompt's latest rewards, in this round and before."""
    per_prompt_stat_tracking_buffer_size: Count = 32
    """Size of each prompt's buffer of latest rewards."""
    per_prompt_stat_tracking_min_count: Count = 16
    """With fewer rewards in the buffer, mean and deviation are those of the round."""
    clip_range: NotNegative = 1e-4
    """PPO clip range: the ratio of a step's probabilities counts only within 1 - clip_range and 1 + clip_range."""
    adv_clip_max: NotNegative = 5.0
    """Advantages are kept within this many standard deviations."""
    kl_weight: NotNegative = 0.0
    """Weight of KL(policy || model before training) at each step; above 0, its network calls are added."""


@documented
@dataclass(frozen=True)
class GRPOConfig(TrainingConfig):
    """GRPO: fine-tune a LoRA on any reward by comparing the images of a prompt (Flow-GRPO,
    https://arxiv.org/abs/2505.05470)."""

    output_dir: str = "runs/grpo"
    num_inference_steps: Steps = 10
    sampler: Literal["ancestral"] = "ancestral"
    """Sampler with a log-probability, the only one; --kernel says how it adds noise."""
    kernel: Literal["flow", "dance", "cps", "ddim"] | None = None
    """How a step adds noise: flow, the SDE of Flow-GRPO; dance, that of DanceGRPO (both of flows); cps, coefficients
    preserved; ddim, DDIM with eta. If not given: flow for a flow, and ddim for others."""
    eta: Positive | None = None
    """Noise of the sampler, above 0. If not given: 0.7 for flow, 0.3 for dance, 0.8 for cps, 1 for ddim."""
    guidance: str = "none"
    """Guidance method, in training as in use; without one, sampling and training cost half."""
    gradient_accumulation_steps: Many = 4
    """Backward passes of each trained sampler step per optimiser step."""
    learning_rate: Positive = 3e-4

    updates_per_round: Many = 1
    """Optimiser steps on the images of one round, each step on its own share of them."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 8
    """Images of each prompt, whose rewards are compared."""
    shared_noise: bool = False
    """Begin all images of a prompt from one first noise, as DanceGRPO does."""
    sde_window: Whole = 3
    """Sampler steps in a row that add noise and are trained; the others are the ODE's. 0: all steps."""
    window_schedule: Literal["random", "progressive"] = "random"
    """Where that window is: random, anywhere in the first half, anew each round (Flow-GRPO-Fast); progressive, from the
    first steps to the last (MixGRPO)."""
    window_interval: Count = 25
    """Optimiser steps after which a progressive window moves by one."""
    advantage_std: Literal["residual", "group", "raw"] = "residual"
    """What divides a reward's distance from its prompt's mean: residual, the deviation of these distances; group, the
    prompt's own (DanceGRPO); raw, that of all rewards (Flow-GRPO)."""
    adv_clip_max: NotNegative = 5.0
    """Advantages are kept within this many standard deviations."""
    trust: Literal["clip", "guard"] = "clip"
    """Trust region: clip, PPO's; guard, GRPO-Guard's, whose ratio has the same scale at all steps."""
    clip_range: NotNegative | None = None
    """PPO clip range: the ratio of a step's probabilities counts only within 1 - clip_range and 1 + clip_range. If not
    given: 1e-4 for clip, 2e-6 for guard."""
    kl_weight: NotNegative = 0.0
    """Weight of the divergence from the model before training at each step; above 0, its network calls are added."""
    kl_form: Literal["gaussian", "velocity"] = "gaussian"
    """Divergence: gaussian, KL of the two steps; velocity, the squared difference of the networks' outputs."""


@documented
@dataclass(frozen=True)
class NFTConfig(TrainingConfig):
    """NFT: fine-tune a LoRA on any reward by the forward process, with no sampler in training (DiffusionNFT,
    https://arxiv.org/abs/2509.16117)."""

    output_dir: str = "runs/nft"
    num_inference_steps: Steps = 10
    guidance: str = "none"
    """Guidance method of the images that are made; the paper has none there, and the training has none in any case."""
    gradient_accumulation_steps: Many = 4
    """Backward passes of each noise level per optimiser step."""
    learning_rate: Positive = 3e-4

    loss: Literal["nft", "awm", "dgpo"] = "nft"
    """Loss: nft, two mirror images of the model, one drawn to better images, the other to worse; awm, PPO's loss of the
    denoising errors; dgpo, that of a whole group's preference."""
    beta: NotNegative | None = None
    """How far the mirror images are from the old model (nft), or the weight of a group's margin (dgpo). If not given: 1
    for nft, 100 for dgpo."""
    levels_per_image: Many = 4
    """Noise levels of an image in an optimiser step, each with a backward pass: of the sampler's own, none twice."""
    adaptive_weight: bool = True
    """Divide an image's error by its mean distance, so that all noise levels weigh alike (nft)."""
    old_schedule: Literal["linear", "late"] = "linear"
    """How slowly the weights that make the images follow after n optimiser steps: linear, old = d old + (1 - d) new
    with d = min(0.001 n, 0.5); late, with d = 0 until n = 75, then min(0.0075 (n - 75), 0.999)."""
    updates_per_round: Many = 1
    """Optimiser steps on the images of one round, each step on its own share of them."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 8
    """Images of each prompt, whose rewards are compared."""
    advantage_std: Literal["residual", "group", "raw"] = "raw"
    """What divides a reward's distance from its prompt's mean: residual, the deviation of these distances; group, the
    prompt's own; raw, that of all rewards, as in the paper's code."""
    adv_clip_max: NotNegative = 5.0
    """Advantages are kept within this many standard deviations; an image at the upper end has quality 1."""
    clip_range: NotNegative | None = None
    """PPO clip range of awm and dgpo. If not given: 1 for awm, 0.05 for dgpo."""
    kl_weight: NotNegative = 1e-4
    """Weight of the squared difference between the outputs of the model and of the one before training; 0 leaves its
    network calls out."""


@documented
@dataclass(frozen=True)
class D3POConfig(TrainingConfig):
    """D3PO: fine-tune a LoRA on preferences between sampled images, step by step (https://arxiv.org/abs/2311.13231)."""

    output_dir: str = "runs/d3po"
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards that judge, if there are no labels, as a weighted sum; the image of the greater sum is preferred."""
    labels: str | None = None
    """A person's choices: a file of `difftune label` on images of `difftune sample --eta`. If not given: the reward
    judges."""
    num_inference_steps: Steps = 20
    sampler: Literal["ancestral"] = "ancestral"
    """Sampler with a log-probability, the only one: DDIM with eta, or the SDE of a flow."""
    eta: Positive | None = None
    """Noise of the sampler, above 0. If not given: DDPM's 1 for DDIM, and 0.7 for a flow's SDE."""
    learning_rate: Positive = 3e-5

    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Images of each prompt, from one first noise; every two of them are a pair. 2 with labels."""
    beta: NotNegative = 0.1
    """Weight of the log-ratios in the preference's log-odds; the greater, the stronger a pair is pulled apart."""
    clip_range: NotNegative = 0.1
    """PPO clip range: the ratio of a step's probabilities counts only within 1 - clip_range and 1 + clip_range."""


@documented
@dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """What recipes that train on denoising errors of preferred images are told."""

    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards that judge, if there are no labels, as a weighted sum; the image of the greater sum is preferred."""
    labels: str | None = None
    """Pairs, a better and a worse picture: a file of `difftune label`, a folder with pairs.jsonl, a file of HPD, or
    dataset:NAME, as of Pick-a-Pic. All count alike. If not given: images are made, and the reward judges."""
    updates_per_round: Many = 1
    """Optimiser steps on the same images, each at other noise levels, before the model makes new ones."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Images that are made of each prompt."""
    rank: Many = 8
    learning_rate: Positive = 1e-5
    adam_weight_decay: NotNegative = 1e-2


@documented
@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Diffusion-DPO: fine-tune a LoRA on pairs, a better and a worse image (https://arxiv.org/abs/2311.12908)."""

    output_dir: str = "runs/dpo"
    train_batch_size: Many = 4
    """Pairs per process and backward pass."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Images that are made for each pair, which is the best and the worst of them."""
    beta: NotNegative = 5000.0
    """Weight of the difference of denoising errors, which are means over the latent's elements."""


@documented
@dataclass(frozen=True)
class KTOConfig(PreferenceConfig):
    """Diffusion-KTO: fine-tune a LoRA on images that are good or bad, each by itself
    (https://arxiv.org/abs/2404.04465)."""

    output_dir: str = "runs/kto"
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Images that are made of each prompt; those above the mean reward of their prompt are good."""
    beta: NotNegative = 1000.0
    """Weight of the gain in denoising error, a mean over the latent's elements."""
    desirable_weight: NotNegative = 1.0
    """Weight of the good images' loss."""
    undesirable_weight: NotNegative = 1.0
    """Weight of the bad images' loss."""


@documented
@dataclass(frozen=True)
class DROConfig(PreferenceConfig):
    """DRO: fine-tune a LoRA to denoise good images better and bad ones worse (https://arxiv.org/abs/2503.22677)."""

    output_dir: str = "runs/dro"
    train_batch_size: Many = 4
    """Pairs per process and backward pass."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Images that are made for each pair, which is the best and the worst of them."""
    learning_rate: Positive = 5e-6
    max_loser_loss: NotNegative | None = None
    """A bad image's denoising error is not raised beyond this. If not given: it has no bound, as in the paper."""


@documented
@dataclass(frozen=True)
class PSOConfig(TrainingConfig):
    """PSO: fine-tune a LoRA of a few-step model on pairs, at its own steps (https://arxiv.org/abs/2410.03190)."""

    model: str = "tiny-turbo"
    """Model to train, distilled to a few steps: tiny-turbo, a folder in diffusers' format, or an id on the Hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards that judge, if there are no pictures, as a weighted sum; the image of the greater sum is preferred."""
    images: str | None = None
    """Folder of pictures of a style or a concept, captioned by metadata.jsonl or by text files beside them, which are
    preferred to what the model makes of their captions (offline). If not given: images are made, and the reward judges
    (online)."""
    caption: str | None = None
    """Caption of the pictures that have none."""
    num_negatives: Many = 4
    """Images that the model makes of each picture's caption before training (offline)."""
    output_dir: str = "runs/pso"
    train_batch_size: Many = 8
    """Images online, and pictures offline, per process and backward pass."""
    num_images_per_prompt: Annotated[int, Range(2, 1_000_000)] = 2
    """Trajectories of each prompt, of which the best and the worst are a pair (online)."""

    num_inference_steps: Steps = 4
    """Sampler steps, which are those that the model was distilled to."""
    sampler: Literal["ancestral"] = "ancestral"
    """Sampler with a log-probability, the only one; --transition says how it adds noise."""
    transition: Literal["lcm", "ancestral"] | None = None
    """How a step adds noise: lcm, all of it is new (LCM, DMD2, tiny-turbo), or ancestral, Euler's (SD-Turbo,
    SDXL-Turbo). If not given: lcm for a pipeline with an LCM scheduler, else ancestral."""
    guidance: str = "none"
    """Guidance method; distilled few-step models want none."""
    rank: Many = 32
    """Rank of the LoRA."""
    learning_rate: Positive = 1e-5
    """Learning rate after the warm-up."""
    adam_weight_decay: NotNegative = 1e-6
    """Weight decay, a share of the learning rate per step."""

    beta: NotNegative | None = None
    """Weight of the margin in the preference's log-odds. If not given: 50 online, and 5000 offline, where the margin is
    half a difference of denoising errors."""
    clip_range: NotNegative = 0.1
    """PPO clip range: the ratio of a step's probabilities counts only within 1 - clip_range and 1 + clip_range
    (online)."""


@documented
@dataclass(frozen=True)
class DragonConfig(TrainingConfig):
    """DRAGON: fine-tune a LoRA on sets of better and of worse images (https://arxiv.org/abs/2504.15217)."""

    objective: Literal["instance", "item-frechet", "item-mmd", "frechet", "mmd", "vendi"] = "instance"
    """What to raise: instance, the rewards; item-frechet or item-mmd, each image's likeness to exemplars; frechet or
    mmd, the likeness of the set of images to them; vendi, the set's diversity."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards of the objective instance, as a weighted sum. They need no gradient."""
    exemplars: str | None = None
    """What images are to be like: a folder of pictures, or a text file with one text on each line."""
    encoder: str = "tiny-clip"
    """Reward with towers for pictures and texts, which gives the features of a distribution; item-frechet takes the
    model's VAE."""
    shrinkage: Share = 0.1
    """Shrinkage of the covariances of a Fréchet distance towards a sphere."""
    feature_dims: Many = 32
    """Principal components of the exemplars that the Fréchet distance of a set looks at."""
    output_dir: str = "runs/dragon"

    pairs_per_round: Annotated[int, Range(2, 1_000_000)] = 64
    """Prompts of a round and process; two images are made of each."""
    updates_per_round: Many = 16
    """Optimiser steps on a round; each takes its own pairs of it, all in turn."""
    sweeps: Many = 3
    """The pairs of a round are gone over at most this often to find the sets."""
    loss: Literal["dpo", "kto"] = "dpo"
    """How sets become an update: dpo, on pairs, or kto, on single images."""
    beta: NotNegative | None = None
    """Weight of the differences of denoising errors, which are means over the latent's elements. If not given: 5000 for
    dpo and 1000 for kto."""
    train_batch_size: Many = 8
    """Pairs per process and backward pass."""
    num_win_rate_images: Annotated[int, Range(0, 1_000_000)] = 64
    """Images of new prompts, before and after training, that the win rate compares; 0 leaves it out."""
    rank: Many = 8
    """Rank of the LoRA."""
    learning_rate: Positive = 1e-5
    """Learning rate after the warm-up."""
    adam_weight_decay: NotNegative = 1e-2
    """Weight decay, a share of the learning rate per step."""
