"""The model card of a run: what was trained on what, and code that loads it."""

from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin

from difftune.configs.training import TrainingConfig
from difftune.lookup import guidance_named
from difftune.pipelines import full_weights, lora
from difftune.recipes.catalogue import Recipe
from difftune.training.state import Metrics
from guidance.methods.cfg import CFG, Plain


def model_card(recipe: Recipe, config: TrainingConfig, pipe: Any, metrics: Metrics) -> str:
    """The card in markdown, with a block of Python that loads the pipeline and draws a picture."""
    kind = "Full weights" if config.full_finetuning else "LoRA"
    size = "every weight of the denoiser" if config.full_finetuning else f"rank {config.rank}"
    steps = int(metrics.get("step", config.max_train_steps))  # fewer if a run was stopped early
    reward = (
        f" Mean training reward of the last step: {metrics['reward_mean']:.4f}." if "reward_mean" in metrics else ""
    )
    return f"""---
base_model: {config.model}
library_name: diffusers
tags: [{"full-weights" if config.full_finetuning else "lora"}, text-to-image, reward, {recipe.name}, difftune]
---

# {kind} of {config.model}, trained on {trained_on(config)}

{recipe.title} ([{recipe.paper}]({recipe.url})) by difftune: {steps} optimiser steps of
{config.train_batch_size * config.gradient_accumulation_steps} images (per process), {size}, seed
{config.seed}.{reward}{went_on(config)} A reward that is trained on is not evidence of quality: evaluate on another.

```python
{moving_code(config) if recipe.name == "hypernoise" else loading_code(config, pipe)}
```

It was trained under {guidance_text(config)}, {config.num_inference_steps} sampler steps and the sampler
{config.sampler}: use it so.

Every setting is in `config.yaml`, every step in `metrics.jsonl`; `difftune train {recipe.name} --config config.yaml
--output_dir NEW` runs it again.
"""


def drawing_code(config: TrainingConfig, pipe: Any) -> str:
    """Python that draws a picture under the guidance of the training."""
    call = f'pipe("a prompt", num_inference_steps={config.num_inference_steps}'
    method = guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
    if type(method) in (CFG, Plain) and type(pipe).__name__.startswith("StableDiffusion"):
        return f"image = {call}, guidance_scale={vars(method)['scale']:g}).images[0]"
    keys = [f"{key}={value!r}" for key, value in options_of(config).items()]
    return (
        "from difftune import attach\nfrom difftune.lookup import guidance_named\n"
        f"method = guidance_named({config.guidance!r}, options=dict({', '.join(keys)}))\n"
        f"with attach(pipe, method):\n    image = {call}).images[0]"
    )


def guidance_text(config: TrainingConfig) -> str:
    """The guidance of the training, as the flags say it."""
    flags = " ".join(f"--guidance.{key} {value}" for key, value in options_of(config).items())
    return f"`--guidance {config.guidance}{' ' if flags else ''}{flags}`"


def options_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings of the guidance that were given."""
    scale = {} if config.guidance_scale is None else {"scale": config.guidance_scale}
    return {**config.guidance_options, **scale}


def trained_on(config: TrainingConfig) -> str:
    """The reward, or what took its place, in words."""
    settings = vars(config)
    if settings.get("labels"):
        return "a person's labels"
    if settings.get("images"):
        return f"the pictures of {settings['images']}"
    if settings.get("objective", "instance") != "instance":
        return f"the objective {settings['objective']}"
    return ", ".join(config.reward)


def went_on(config: TrainingConfig) -> str:
    return "" if config.lora is None else f" It went on from the LoRA {config.lora}."


def moving_code(config: TrainingConfig) -> str:
    """Python that draws a picture whose noise is moved by the LoRA, which is not for the model itself."""
    settings = f'model="{config.model}", noise_lora="{config.output_dir}", prompt=["a prompt"]'
    return (
        "from difftune import generate\nfrom difftune.configs.images import SampleConfig\n"
        f"config = SampleConfig({settings}, guidance={config.guidance!r},\n"
        f'                      num_inference_steps={config.num_inference_steps}, output_dir="pictures")\n'
        "generate(config)"
    )


def loading_code(config: TrainingConfig, pipe: Any) -> str:
    """Python that makes `pipe`, the base model with what the run has trained, and draws a picture with it."""
    folder = config.output_dir
    lines = ["from difftune import load_model", f'pipe = load_model("{config.model}")']
    if config.full_finetuning:
        network = type(lora.network_of(pipe)).__name__
        part = full_weights.folder_of(pipe, folder)
        lines[0] = f"from diffusers import {network}\n{lines[0]}"
        lines.append(f'pipe.{part.name} = {network}.from_pretrained("{part}")')
    elif isinstance(pipe, LoraBaseMixin):
        lines.append(f'pipe.load_lora_weights("{folder}")')
    else:  # PixArt's pipeline has no such method
        lines[0] = "from difftune import load_model, lora"
        lines.append(f'lora.attach(pipe, "{folder}")')
    return "\n".join([*lines, drawing_code(config, pipe)])
