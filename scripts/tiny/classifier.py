"""Stage `classifier`: `tiny-classifier`, the colour and shape of one object."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rewards.world.classifier import CLASSES, ShapeClassifier
from scripts.tiny import scenes, vae
from scripts.tiny.fit import Fit, Setup

SHARDS = 16


def trained(setup: Setup, steps: int = 1500) -> ShapeClassifier:
    """One object, drawn or through the VAE, with up to 0.1 of Gaussian noise."""
    setup.seeded("classifier", "weights")
    model = ShapeClassifier().to(setup.device)
    images, labels = _single(setup)
    rough = torch.cat([vae.through(vae.trained(setup), part) for part in images.split(250)])

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(images), (setup.batch,), device=images.device)
        use = torch.rand(len(pick), 1, 1, 1, device=images.device) < 0.5
        x = (torch.where(use, images[pick], rough[pick]) + 1) / 2
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)
        return cross_entropy(model(x), labels[pick])

    Fit(setup, "classifier", {"classifier": model}, loss, steps, 2e-3).run()
    return model.eval()


def _single(setup: Setup) -> tuple[Tensor, Tensor]:
    """Pictures of one object in [-1, 1], and their classes."""
    images, labels = [], []
    for number in range(SHARDS):
        shard = scenes.drawn(setup.seed, number)
        chosen = [i for i, scene in enumerate(shard.scenes) if len(scene.things) == 1]
        images.append(scenes.pixels(shard.images[chosen], setup))
        things = [shard.scenes[i].things[0] for i in chosen]
        labels += [CLASSES.index(f"{thing.color} {thing.shape}") for thing in things]
    return torch.cat(images), torch.tensor(labels, device=setup.device)
