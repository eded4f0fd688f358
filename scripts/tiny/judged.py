"""Stage `judged`: the second round of `tiny-clip`, on pictures that `tiny` draws and the oracle judges.

The text tower stays, since the image models read by it; the image tower learns what a drawn picture lacks. It learns it
on pictures moved against it (https://arxiv.org/abs/1706.06083): a judge that no small change of the pixels deceives has
gradients that change what is seen (https://arxiv.org/abs/1805.12152), and rewards are followed by their gradients here.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.world.oracle import Oracle
from scripts.tiny import clip, turbo, unet, vae, words
from scripts.tiny.fit import Fit, Setup, save

PARTS, PART = 32, 250
SCALES, STEPS = (1.0, 2.0, 3.0, 6.0), (4, 8, 25)  # what the parts are drawn with, in turn
RADIUS = 1.0  # in L2 of pixels in [-1, 1]: as far as a picture is moved against the judge


def trained(setup: Setup, steps: int = 2000) -> CLIP:
    """Half contrastive as before, half logistic: the cosine of a drawn picture says whether its caption holds."""
    parts = [load_file(file) for file in pictures(setup)]
    images, ids, holds = (torch.cat([part[key] for part in parts]) for key in ("images", "ids", "holds"))
    model = deepcopy(clip.trained(setup)).requires_grad_(False)
    model.visual.requires_grad_(True)
    limit = nn.Linear(1, 1, bias=True, device=setup.device)  # of the cosine, above which a caption holds
    nn.init.constant_(limit.weight, 2.0)  # a caption that holds begins at a cosine of .34, another at .12
    nn.init.constant_(limit.bias, -5.0)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(images), (setup.batch,))
        x = images[chosen].to(setup.device).float() / 127.5 - 1
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.7, clip.wobbled(x, 1.0), x)
        text = model.encode_text(ids[chosen].to(setup.device), normalize=True)
        truth = holds[chosen].to(setup.device)

        def judged(x: Tensor) -> Tensor:
            image = model.encode_image(x, normalize=True)
            verdict = limit(10 * (image * text).sum(1, keepdim=True))[:, 0]
            return F.binary_cross_entropy_with_logits(verdict, truth)

        against = moved_against(x + 0.02 * torch.randn_like(x), judged)
        return judged(against) + 0.5 * clip.contrast(model, setup, step)

    Fit(setup, "judged", {"clip": model, "limit": limit}, loss, steps, 5e-4).run()
    return model.eval()


def moved_against(x: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 2) -> Tensor:
    """Each picture moved by at most a radius of its own, below RADIUS, along the gradient that raises the loss."""
    radius = RADIUS * torch.rand(len(x), 1, 1, 1, device=x.device)
    moved = torch.zeros_like(x)
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x + moved), moved)
        moved = moved.detach() + 0.7 * radius * F.normalize(gradient.flatten(1)).view_as(x)
        moved = moved * (radius / length(moved).clamp(min=1e-8)).clamp(max=1)
    return x + moved


def length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def pictures(setup: Setup) -> list[Path]:
    """Drawn pictures, parts on disk: images (N, 3, 64, 64) uint8, ids (N, LENGTH), holds (N,) 0 or 1."""
    files = [setup.file(f"judged/{part}.safetensors") for part in range(PARTS)]
    for part, file in enumerate(files):
        if not file.exists():
            save(drawn(setup, part), file)
            print(f"judged pictures {(part + 1) * PART} of {PARTS * PART}", flush=True)
    return files


@torch.no_grad()
def drawn(setup: Setup, part: int) -> dict[str, Tensor]:
    """One part, for captions that no list of prompts tests."""
    rng = np.random.default_rng([setup.seed, 8, part])
    texts = [str(turbo.draw_caption(rng)) for _ in range(PART)]
    ids, decoder = words.tokens(texts), vae.finished(setup)
    setup.seeded("judged", part)
    x = torch.randn(PART, 4, 8, 8, device=setup.device)
    z = unet.guided(setup, x, ids, STEPS[part % len(STEPS)], SCALES[part % len(SCALES)])[1][-1]
    made = (decoder.decode(z / decoder.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).cpu()
    return {"images": (255 * made).round().byte(), "ids": ids, "holds": Oracle()(made, texts)}
