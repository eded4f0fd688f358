"""LAION's aesthetic predictors: a small head on CLIP's picture embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from rewards import hub
from rewards.checks import paired
from rewards.errors import RewardError
from rewards.learned.clip import VIT_L, vision_config
from rewards.learned.layouts import built, under
from rewards.learned.preprocess import Preprocess

Variant = Literal["sac", "ava", "v1"]
BUNDLED = Path(__file__).parents[1] / "weights" / "aesthetic" / "heads.safetensors"  # by scripts/make_aesthetic.py
LINEAR = (("layers", (0, 2, 4, 6, 7)), ("scoring_head", (0, 2, 4, 6, 8)))  # published layouts with nothing between
RELU = (("layers", (0, 3, 6, 9, 11)),)  # and those with a ReLU after every layer but the last

Head = list[tuple[Tensor, Tensor]]  # weights (N, M) and biases (N,), applied in turn with a ReLU between


class Aesthetic:
    """head(f(image) / |f(image)|), with f CLIP ViT-L/14's embedding; 5 is usual and 6 is good.

    The published head is a stack of linear layers with nothing between them but dropout, so that it is one affine map,
    w . f / |f| + b, and its gradient has one direction in embedding space: it is easily hacked. `variant` "sac" is
    sac+logos+ava1-l14-linearMSE and "ava" is ava+logos-l14-linearMSE
    (https://github.com/christophschuhmann/improved-aesthetic-predictor); "v1" is LAION's first predictor
    (https://github.com/LAION-AI/aesthetic-predictor), whose scores LAION-Aesthetics is cut by. Their scores differ.

    `predictor` and `weights` are local files of a head and of the CLIP, in place of the bundled and the pinned ones: a
    head of these layouts, or of ava+logos-l14-reluMSE, which is a network. Raises ValueError for another, and for one
    of another CLIP, whose embedding has another width (v2.5's is of SigLIP).
    """

    differentiable = True

    def __init__(
        self,
        variant: Variant = "sac",
        predictor: str | Path | None = None,
        weights: str | Path | None = None,
        sizes: Mapping[str, Any] = VIT_L,
        dtype: str = "float32",
    ):
        if variant not in get_args(Variant):
            raise RewardError(f"the aesthetic predictor has the variants sac, ava and v1, not {variant!r}")
        layers = bundled(variant) if predictor is None else hub.read(predictor)
        self.head = [(weight.float(), bias.float()) for weight, bias in head_of(layers)]
        clip = hub.state("clip-vit-l-14") if weights is None else hub.read(weights)
        vision = {key: value for key, value in under(clip, "").items() if key.startswith(("vision_model.", "visual_"))}
        config = vision_config(sizes)
        self.model = built(CLIPVisionModelWithProjection, config, vision, dtype)
        self.preprocess = Preprocess(config.image_size)
        fits(self.head, self.model.config.projection_dim)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return score(self.head, self.image_features(images))

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP's embedding, of unit length, in float32, (B, 3, H, W) in [0, 1] -> (B, D)."""
        self.model.to(images.device)
        x = self.preprocess(images).to(self.model.dtype)
        return F.normalize(self.model(pixel_values=x).image_embeds.float(), dim=1)


def score(head: Head, features: Tensor) -> Tensor:
    """The head's value of each row, (B, D) -> (B,), in the features' dtype."""
    first, *rest = [(weight.to(features), bias.to(features)) for weight, bias in head]
    x = F.linear(features, *first)
    for weight, bias in rest:
        x = F.linear(x.relu(), weight, bias)
    return x.squeeze(1)


def fits(head: Head, width: int) -> None:
    """RewardError for a head that does not read an embedding of this width."""
    if (wanted := head[0][0].shape[1]) != width:
        raise RewardError(
            f"the aesthetic predictor reads an embedding of {wanted} numbers, and this CLIP gives {width}: give the "
            "predictor of this CLIP"
        )


def bundled(variant: Variant) -> dict[str, Tensor]:
    """The published head as one affine map, in float64."""
    found = load_file(BUNDLED)
    return {part: found[f"{variant}.{part}"] for part in ("weight", "bias")}


def head_of(tensors: Mapping[str, Tensor]) -> Head:
    """The head that a file holds, in float64; linear layers with nothing between them as one map."""
    if tensors.keys() == {"weight", "bias"}:
        return joined([(tensors["weight"].double(), tensors["bias"].double())])
    for layouts, between in ((LINEAR, False), (RELU, True)):
        for prefix, numbers in layouts:
            names = [(f"{prefix}.{n}.weight", f"{prefix}.{n}.bias") for n in numbers]
            if tensors.keys() == {name for pair in names for name in pair}:
                head = joined([(tensors[weight].double(), tensors[bias].double()) for weight, bias in names])
                return head if between else [affine(head)]
    some = ", ".join(sorted(tensors)[:3])
    raise RewardError(
        f"a file of {some} and so on is not a known aesthetic predictor: give a file of layers.{{0,2,4,6,7}} or "
        "{0,3,6,9,11}, of scoring_head.{0,2,4,6,8}, or of one weight and bias"
    )


def joined(head: Head) -> Head:
    """The head. RewardError unless each layer reads what the one before it gives, and the last gives one number."""
    reads = [*(weight.shape[-1] for weight, _ in head[1:]), 1]
    gives = [len(weight) for weight, _ in head]
    if reads != gives:
        raise RewardError(f"the layers of this aesthetic predictor give {gives} numbers and the next read {reads}")
    return head


def affine(layers: Head) -> tuple[Tensor, Tensor]:
    """w (1, D) and b (1,) with w x + b = the linear layers applied in turn."""
    (weight, bias), *rest = layers
    for w, b in rest:
        weight, bias = w @ weight, w @ bias + b
    return weight, bias


def aesthetic_ava(
    predictor: str | Path | None = None,
    weights: str | Path | None = None,
    sizes: Mapping[str, Any] = VIT_L,
    dtype: str = "float32",
) -> Aesthetic:
    """The variant ava+logos-l14-linearMSE."""
    return Aesthetic("ava", predictor, weights, sizes, dtype)


def aesthetic_v1(
    predictor: str | Path | None = None,
    weights: str | Path | None = None,
    sizes: Mapping[str, Any] = VIT_L,
    dtype: str = "float32",
) -> Aesthetic:
    """LAION's first predictor."""
    return Aesthetic("v1", predictor, weights, sizes, dtype)
