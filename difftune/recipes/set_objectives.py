"""What DRAGON raises: a reward of one image, of one image against exemplars, or of a whole set.

An objective looks at each image once, for features (B, D), and is a reward of a set of these
(`rewards.sets.catalogue`). Where it scores single images, D is 1 and the set's reward is the mean score, so that one
algorithm serves all three classes of https://arxiv.org/abs/2504.15217.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftune.configs.recipes import DragonConfig
from difftune.errors import UserError
from difftune.files.pictures import list_pictures, read_all
from difftune.files.prompts import read_prompts
from difftune.lookup import reward_named
from rewards.registry import Reward, entry
from rewards.sets.catalogue import MMD, Frechet, Mean, SetReward, Vendi
from rewards.sets.exemplar import Encoder, encoder_of
from rewards.sets.frechet import frames, frechet_of, moments, square_root
from rewards.sets.mmd import cubic
from solvers.latent import LatentModel

Look = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # latents, images, prompts -> features (B, D)


@dataclass(frozen=True)
class SetObjective:
    """Features of images, and the reward of a set of them."""

    look: Look
    reward: SetReward

    def value(self, features: Tensor) -> float:
        """The reward of a set of features (B, D)."""
        return float(self.reward.value(self.reward.begin(features)))

    @property
    def single(self) -> bool:
        """Whether features are scores of single images."""
        return isinstance(self.reward, Mean)


def instance(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """r(x, c): the rewards that config names."""
    judge = reward_named(config.reward, gradient=False) if reward is None else reward
    return SetObjective(lambda latents, images, prompts: judge(images, prompts)[:, None], Mean())


def item_frechet(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """Minus the Fréchet distance between the places of one image's latent and those of all exemplars' latents.

    The VAE is the encoder: an image of h x w places is a set of so many features of as many dimensions as channels.
    """
    images = read_all(list_pictures(exemplars_of(config)), model.size())
    places = torch.cat([_places(model.encode_images(image[None].to(model.device))) for image in images])
    target = moments(places.flatten(0, 1), config.shrinkage)
    root = square_root(target.covariance)

    def look(latents: Tensor, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -frechet_of(frames(_places(latents), config.shrinkage), target, root)[:, None].float()

    return SetObjective(look, Mean())


def item_mmd(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """2 mean k(f(x), exemplars) - k(f(x), f(x)), which is minus the MMD^2 to one image up to a constant."""
    encoder, exemplars = load_exemplars(config, model)
    e = exemplars.double()

    def look(latents: Tensor, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = encoder.image_features(images).double()
        return (2 * cubic(x, e).mean(1) - cubic(x, x).diagonal())[:, None].float()

    return SetObjective(look, Mean())


def set_frechet(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """Minus the Fréchet distance of the set to the exemplars, in the space of the exemplars' principal components."""
    encoder, exemplars = load_exemplars(config, model)
    basis = principal_directions(exemplars, config.feature_dims)
    return SetObjective(
        lambda latents, images, prompts: encoder.image_features(images) @ basis,
        Frechet(exemplars @ basis, config.shrinkage),
    )


def set_mmd(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """Minus the MMD^2 of the set to the exemplars."""
    encoder, exemplars = load_exemplars(config, model)
    return SetObjective(lambda latents, images, prompts: encoder.image_features(images), MMD(exemplars))


def set_vendi(config: DragonConfig, model: LatentModel, reward: Reward | None) -> SetObjective:
    """The Vendi score of the set: without exemplars, it asks for unlike images."""
    encoder = encoder_of(config.encoder)
    return SetObjective(lambda latents, images, prompts: encoder.image_features(images), Vendi())


OBJECTIVES: dict[str, Callable[[DragonConfig, LatentModel, Reward | None], SetObjective]] = {
    "instance": instance,
    "item-frechet": item_frechet,
    "item-mmd": item_mmd,
    "frechet": set_frechet,
    "mmd": set_mmd,
    "vendi": set_vendi,
}
WITHOUT_EXEMPLARS = ("instance", "vendi")


# ------------------------------------------------------------------------------------------------ exemplars


@torch.no_grad()
def load_exemplars(config: DragonConfig, model: LatentModel) -> tuple[Encoder, Tensor]:
    """The encoder, and the features (M, D) of the exemplars: of a folder's pictures, or of a file's lines of text."""
    encoder, source = encoder_of(config.encoder), exemplars_of(config)
    if source.is_dir():
        images = read_all(list_pictures(source), model.size()).to(model.device)
        return encoder, torch.cat([encoder.image_features(part) for part in images.split(32)])
    return encoder, encoder.text_features(read_prompts(source), model.device)


def exemplars_of(config: DragonConfig) -> Path:
    """The exemplars' file or folder. Raises UserError if there are none, or fewer than a distribution needs."""
    if config.exemplars is None:
        raise UserError(f"objective {config.objective!r} wants --exemplars: a folder of pictures, or a file of texts")
    source = Path(config.exemplars)
    if config.objective == "item-frechet" and source.is_file():
        raise UserError(f"objective 'item-frechet' compares places of latents: {source} must be a folder of pictures")
    count = len(read_prompts(source)) if source.is_file() else len(list_pictures(source))
    if count < 2:
        raise UserError(f"{source} holds {count} exemplar: a distribution wants at least 2")
    return source


def check_objective(config: DragonConfig) -> None:
    """UserError for the first invalid setting of the objective; nothing is loaded."""
    entry(config.encoder)
    if config.objective not in WITHOUT_EXEMPLARS:
        exemplars_of(config)


def principal_directions(features: Tensor, dims: int) -> Tensor:
    """The leading principal directions (D, min(dims, D)) of features (M, D), about their mean."""
    _, vectors = torch.linalg.eigh(moments(features).covariance)
    return vectors[:, -min(dims, features.shape[1]) :].to(features)


def _places(latents: Tensor) -> Tensor:
    """(B, C, h, w) as (B, h w, C)."""
    return latents.flatten(2).mT
