"""Labelled images sampled again, step by step, from the seeds that `difftune sample` wrote beside them.

A picture of `difftune sample --eta 1` is a function of its seed and of the settings in its folder's sample.json. The
trajectory that led to it is made again, and must end in the picture that the person saw.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.configs.recipes import D3POConfig
from difftune.errors import RunError, UserError
from difftune.files.pictures import read_picture
from difftune.files.prompts import listed
from difftune.labelling.choices import Choice, decided
from difftune.lookup import method_of
from difftune.rollouts.policy import Policy
from difftune.rollouts.session import Session
from difftune.rollouts.trajectories import Rolled, with_network
from solvers.samplers.catalogue import gaussian

SETTINGS = "sample.json"
TOLERANCE = 0.03  # mean absolute difference of pixels in [0, 1]; that of two pictures of the world is above 0.1


def check_replay(config: D3POConfig, choices: Sequence[Choice]) -> None:
    """UserError, which names the line, unless config would make every labelled picture again."""
    if config.num_images_per_prompt != 2:
        raise UserError(
            f"num_images_per_prompt is {config.num_images_per_prompt}, and a label is of 2 images: "
            "leave --num_images_per_prompt out, or train dpo, kto or dro"
        )
    found: dict[Path, Mapping[str, Any]] = {}
    for choice in choices:
        for picture, seed in ((choice.a, choice.seed_a), (choice.b, choice.seed_b)):
            if seed is None:
                raise UserError(
                    f"labels, line {choice.line}: {picture.name} has no seed, which D3PO needs to sample it again: "
                    "label images of difftune sample --eta 1, or train dpo, kto or dro"
                )
            if picture.parent not in found:
                found[picture.parent] = settings_beside(picture)
                check_settings(config, found[picture.parent], picture.parent / SETTINGS)


def settings_beside(picture: Path) -> Mapping[str, Any]:
    """The settings that a picture was made with."""
    try:
        return json.loads((picture.parent / SETTINGS).read_text())["settings"]
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{picture.parent} has no {SETTINGS} of difftune sample, which D3PO needs to sample {picture.name} again"
        ) from error


def check_settings(config: D3POConfig, made: Mapping[str, Any], file: Path) -> None:
    """UserError for the first setting that differs from what the pictures were made with."""
    guidance = method_of(config)
    wanted = {
        "model": config.model,
        "lora": None,
        "guidance": config.guidance,
        "guidance_options": vars(guidance),
        "num_inference_steps": config.num_inference_steps,
        "eta": 1.0 if config.eta is None else config.eta,
    }
    if made.get("eta") == 0:
        raise UserError(
            f"{file}: the images were made with eta 0, whose steps have no probability that D3PO could raise: train "
            "dpo, kto or dro on these labels, or label images of difftune sample --eta 1"
        )
    for name, value in wanted.items():
        if made.get(name) != value:
            raise UserError(
                f"{file}: the images were made with {name}={made.get(name)!r}, not {value!r}: train with that"
            )


def open_choices(session: Session[D3POConfig], policy: Policy) -> Callable[[range], Rolled]:
    """Batches of labelled images: two in a row are a choice's, the winner with score 1 and the loser with 0."""
    chosen = listed(decided(session.config.labels or ""), session.config.seed)
    return lambda numbers: replay(session, policy, [chosen(i) for i in range(numbers.start // 2, numbers.stop // 2)])


@torch.no_grad()
def replay(session: Session[D3POConfig], policy: Policy, choices: Sequence[Choice]) -> Rolled:
    """The trajectories of both pictures of each choice, by the model before training.

    Raises RunError, which names the line, if one does not end in its picture.
    """
    sampler = session.images
    texts = [choice.prompt for choice in choices for _ in range(2)]
    seeds = [seed for choice in choices for seed in (choice.seed_a, choice.seed_b)]
    generators = [torch.Generator().manual_seed(int(seed or 0)) for seed in seeds]
    x = sampler.model.start_scale(sampler.levels) * sampler.model.noise(len(texts), generators)
    noise = [gaussian(x, generators) for _ in range(policy.steps)]
    predict = sampler.predict(sampler.texts(sampler.model, texts))
    trajectory = policy.sample(with_network(predict, session.run.reference), x, noise)
    images = sampler.model.decode(trajectory.end)
    for choice, pair in zip(choices, images.view(-1, 2, *images.shape[1:]), strict=True):
        for picture, image in zip((choice.a, choice.b), pair, strict=True):
            check_same(choice, picture, image)
    wins = [float(picture == choice.winner) for choice in choices for picture in (choice.a, choice.b)]
    return Rolled(texts, predict, trajectory, torch.tensor(wins, device=images.device))


def check_same(choice: Choice, picture: Path, image: Tensor) -> None:
    seen, made = read_picture(picture), image.float().cpu()
    if seen.shape != made.shape or (seen - made).abs().mean() > TOLERANCE:
        raise RunError(
            f"labels, line {choice.line}: {picture} is not what its seed makes with the settings of {SETTINGS}; "
            "was the model changed since?"
        )
