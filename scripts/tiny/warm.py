"""Stage `warm`: begin with the weights of the shipped models, where they fit, instead of with random ones.

Writes `start/STAGE.safetensors`. The text tower of `clip` begins as `tiny`'s text encoder and its image tower as
`tiny-clip`'s, so that the UNet's cross-attention finds the words about where it knows them.
"""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from difftune import models
from rewards.learned.clip import CLIPScore
from rewards.world import draw
from rewards.world.grammar import CATEGORIES
from scripts.tiny import clip, words
from scripts.tiny.fit import Setup, save


def write(setup: Setup) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(models.path("tiny"))
    save({f"vae.{name}": value for name, value in pipe.vae.named_parameters()}, setup.file("start/vae.safetensors"))
    save(_unet(pipe.unet), setup.file("start/tiny.safetensors"))
    weak = UNet2DConditionModel.from_pretrained(models.path("tiny-weak"), subfolder="unet")
    save(_unet(weak), setup.file("start/weak.safetensors"))
    save(clip.parameters(_towers(setup, pipe)), setup.file("start/clip.safetensors"))


def _unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {f"unet.{name}": value for name, value in unet.named_parameters()}


@torch.no_grad()
def _towers(setup: Setup, pipe: StableDiffusionPipeline) -> torch.nn.Module:
    """`tiny-clip` with the shipped image tower, and `tiny`'s text encoder under the projection that fits it best."""
    shipped, model = CLIPScore(models.path("tiny-clip")), clip.make(Setup(setup.state, seed=setup.seed))
    model.visual.load_state_dict(shipped.model.visual.state_dict())
    model.logit_scale.copy_(shipped.model.logit_scale)
    tower = clip.from_transformers(pipe.text_encoder.state_dict())
    for name, value in model.state_dict().items():
        if name in tower:
            part = value[: len(tower[name])] if name in GROWN else value
            part.copy_(tower[name])
    texts = captions(2000)
    pooled = pipe.text_encoder(tokens_of(pipe, texts)).pooler_output
    model.text_projection.copy_(clip.projection(pooled, shipped.text_features(texts)))
    return model


GROWN = ("token_embedding.weight", "positional_embedding")  # new rows stay as they were drawn


def tokens_of(pipe: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def captions(count: int) -> list[str]:
    """Captions that the shipped models know."""
    rng = np.random.default_rng(11)
    found = (str(draw.draw_caption(rng, CATEGORIES[i % len(CATEGORIES)])) for i in range(10 * count))
    return [text for text in dict.fromkeys(found) if len(words.tokenizer()(text).input_ids) <= 16][:count]
