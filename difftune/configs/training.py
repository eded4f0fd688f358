"""The settings that every recipe shares."""

from dataclasses import dataclass, field
from typing import Any

from difftune.configs.fields import documented


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
