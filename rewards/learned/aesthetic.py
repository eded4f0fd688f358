"""LAION's aesthetic predictor v2: an affine map of CLIP's picture embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from rewards import hub
from rewards.checks import paired
from rewards.errors import RewardError
from rewards.learned.clip import VIT_L, vision_config
from rewards.learned.layouts import built, under
from rewards.learned.preprocess import Preprocess


class Aesthetic:
    """w . f(image) / |f(image)| + b, about 4.5 to 7.

    The published predictor is a stack of linear layers with nothing between them but dropout, so that it is one affine
    map, and its gradient has one direction in embedding space: it is easily hacked. `variant` "sac" is
    sac+logos+ava1-l14-linearMSE, "ava" is ava+logos-l14-linearMSE; their scores differ.
    (https://github.com/christophschuhmann/improved-aesthetic-predictor). `predictor` and `weights` are local files of
    the layers and of the CLIP, in place of the pinned ones.
    """

    differentiable = True

    def __init__(
        self,
        variant: Literal["sac", "ava"] = "sac",
        predictor: str | Path | None = None,
        weights: str | Path | None = None,
        sizes: Mapping[str, Any] = VIT_L,
        dtype: str = "float32",
    ):
        if variant not in ("sac", "ava"):
            raise RewardError(f"the aesthetic predictor has the variants sac and ava, not {variant!r}")
        layers = hub.state(f"aesthetic-v2-{variant}") if predictor is None else hub.read(predictor)
        self.weight, self.bias = (x.float() for x in affine(layers))
        clip = hub.state("clip-vit-l-14") if weights is None else hub.read(weights)
        vision = {key: value for key, value in under(clip, "").items() if key.startswith(("vision_model.", "visual_"))}
        config = vision_config(sizes)
        self.model = built(CLIPVisionModelWithProjection, config, vision, dtype)
        self.preprocess = Preprocess(config.image_size)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return self.image_features(images) @ self.weight.to(images.device) + self.bias.to(images.device)

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP's embedding, of unit length, in float32, (B, 3, H, W) in [0, 1] -> (B, D)."""
        self.model.to(images.device)
        x = self.preprocess(images).to(self.model.dtype)
        return F.normalize(self.model(pixel_values=x).image_embeds.float(), dim=1)


def affine(layers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """w (D,) and b () with w . x + b = the stack of linear layers on x, in float64.

    `layers` are `layers.N.weight` and `layers.N.bias`, applied by rising N.
    """
    order = sorted({int(key.split(".")[-2]) for key in layers})
    prefix = next(iter(layers)).rsplit(".", 2)[0]
    weight, bias = None, torch.zeros(())
    for n in order:
        w, b = (layers[f"{prefix}.{n}.{part}"].double() for part in ("weight", "bias"))
        weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    assert weight is not None
    return weight[0], bias[0]


def aesthetic_ava(
    predictor: str | Path | None = None,
    weights: str | Path | None = None,
    sizes: Mapping[str, Any] = VIT_L,
    dtype: str = "float32",
) -> Aesthetic:
    """The variant ava+logos-l14-linearMSE."""
    return Aesthetic("ava", predictor, weights, sizes, dtype)
