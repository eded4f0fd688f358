"""The settings that every recipe shares."""

from dataclasses import dataclass, field
from typing import Any, Literal

from difftune.configs.fields import Config, documented
from solvers.ranges import Count, Decay, Many, NotNegative, Positive, Seed, Steps, Whole


@documented
@dataclass(frozen=True)
class TrainingConfig(Config):
    """What every recipe that trains a model is told."""

    model: str = "tiny"
    """Model to train: tiny, tiny-turbo, a folder in diffusers' format, or an id on the Hub."""
    reward: list[str] = field(default_factory=lambda: ["tiny-clip"])
    """Rewards to raise, as a weighted sum; a weight is 1 if not given."""
    reward_scaling: Literal["none", "range", "running", "group"] = "none"
    """What each reward is divided by before they are summed: none, nothing; range, the width of its nominal range;
    running, the deviation of its scores so far; group, that in the prompt's images (GDPO), if images of a prompt are
    compared: advantage_std is then unused."""
    output_dir: str = "runs/train"
    """Folder of the run. It must be empty, unless the run is resumed."""
    prompts: str = "shapes"
    """Training prompts: a text file with one prompt on each line; shapes or shapes:CATEGORY, captions of the world
    without ShapeEval's; animals; or dataset:NAME[:COLUMN], a data set of the Hub, of a folder or of a file."""
    seed: Seed = 0
    """Seed of the first weights, the prompts, the noise, and all else that is drawn."""
    max_train_steps: Count = 100
    """Optimiser steps."""
    train_batch_size: Many = 8
    """Images per process and backward pass."""
    gradient_accumulation_steps: Many = 1
    """Backward passes per optimiser step."""

    num_inference_steps: Steps = 25
    """Sampler steps of an image."""
    sampler: str = "euler"
    """Sampler of the training images: one of `difftune methods`; euler is DDIM."""
    guidance: str = "cfg"
    """Guidance method, in training as in use: one of `difftune methods`."""
    guidance_scale: float | None = None
    """Short for --guidance.scale. If not given: the method's own default."""
    guidance_options: dict[str, Any] = field(default_factory=dict)
    """A setting of the guidance method, as in --guidance.eta 0.5."""
    embedded_guidance: float | None = None
    """Guidance scale that is told to a network distilled over scales (FLUX.1-dev, LCM), which needs one; no other takes
    it."""
    decode_batch: Count = 1
    """Images that are decoded, and rewarded under a gradient, at a time: the decoder's memory does not grow with the
    batch."""
    num_frames: Count = 1
    """Frames of each film, of a model of films (Wan): 1 more than a multiple of 4; 1 is a picture. The reward of a film
    is the mean over some of its frames, and validations write films as .mp4."""
    reward_frames: Count = 4
    """Frames of a film that are judged, evenly spaced from the first to the last."""
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

    lora: str | None = None
    """Folder of a training run whose LoRA is trained further, by any recipe; rank, lora_alpha and lora_layers must be
    its own. If not given: a new LoRA."""
    reference: Literal["base", "start"] = "base"
    """What a divergence and a preference are measured against: base, the model without a LoRA; start, the model with
    that of --lora, as it was."""
    full_finetuning: bool = False
    """Train every weight of the denoiser in float32 instead of a LoRA; a learning rate near 1e-5 is usual then."""
    lora_layers: Literal["attention", "attention+ff+conv"] = "attention"
    """Layers with a LoRA: the attention, or also the feed-forward, projection, time and convolution layers."""
    rank: Many = 4
    """Rank of the LoRA."""
    lora_alpha: Count | None = None
    """The LoRA's update is scaled by lora_alpha / rank. If not given: rank, which is a scale of 1."""
    lora_dropout: Decay = 0.0
    """Probability that an input of a LoRA layer is dropped in training."""

    optimizer: Literal["adamw", "adamw8bit", "lion"] = "adamw"
    """Optimiser; adamw8bit needs the extra bitsandbytes."""
    learning_rate: Positive = 1e-3
    """Learning rate after the warm-up."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    """Shape of the learning rate over the optimiser steps, as in diffusers."""
    lr_warmup_steps: Whole = 0
    """Optimiser steps over which the learning rate rises from 0."""
    adam_beta1: Decay = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Decay = 0.999
    """Decay of AdamW's mean of squared gradients, and of Lion's mean of gradients."""
    adam_weight_decay: NotNegative = 1e-4
    """Weight decay, a share of the learning rate per step."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of AdamW's mean of squared gradients."""
    max_grad_norm: Positive = 1.0
    """The norm of the gradient over all weights is clipped to this."""
    ema_decay: Decay | None = None
    """Keep an exponential moving average of the weights, of this decay at most, and save it in their place. If not
    given: the weights themselves are saved."""
    max_skipped_steps: Whole = 10
    """Optimiser steps that may be skipped because a reward or a gradient was not finite; one more ends the run."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the frozen networks; no is float32. The LoRA is always float32."""

    checkpointing_steps: Count = 50
    """Optimiser steps between checkpoints."""
    checkpoints_total_limit: Count | None = None
    """Newest checkpoints that are kept. If not given: all."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint, exactly as if the run had not been interrupted: the word latest, or a checkpoint's
    folder."""
    report_to: str = "none"
    """Also report to a tracker of accelerate, as in tensorboard or wandb; metrics.jsonl is always written."""

    validation_steps: Count | None = None
    """Optimiser steps between validations, which draw the same images each time. If not given: no validation."""
    validation_prompts: str = "shapeeval"
    """Prompts of the validation: a text file, or shapeeval, a few of each category of ShapeEval."""
    num_validation_images: Many = 12
    """Images of a validation: the prompts in order, over again if they are fewer, each with its own seed."""
    validation_reward: str | None = None
    """Held-out reward, which is not trained on: it chooses the best checkpoint. If not given: the trained one does."""
    early_stop: bool = False
    """Stop when the held-out reward falls while the trained one rises, by the curves of the validations."""
