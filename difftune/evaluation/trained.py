"""Rewards that a model was trained on: their scores are not evidence of its quality."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from difftune.configs.written import CONFIG
from difftune.files.pictures import SAMPLES
from difftune.files.text import parse_json, read_text
from difftune.models import MODELS
from difftune.pipelines.opened import shares_of
from rewards.compose import parse_rewards
from rewards.errors import RewardError
from rewards.registry import spelled


def rewards_of_model(model: str | None, loras: str | Iterable[str] | None) -> frozenset[str] | None:
    """The rewards that a model with these LoRAs (FOLDER or FOLDER=SHARE) was trained on; None if that is not known.

    Of an embedded model it is known: none. Of any other the LoRAs' runs alone tell, so that without one it is not.
    """
    folders = shares_of([loras] if isinstance(loras, str) else list(loras or []))
    if not folders and model not in MODELS:
        return None
    found: set[str] = set()
    for folder in folders:
        names = rewards_of_run(Path(folder))
        if names is None:
            return None
        found |= names
    return frozenset(found)


def rewards_of_run(folder: Path) -> set[str] | None:
    """The rewards that a run's config.yaml names, and those of the LoRA that it went on from; None without one."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        settings = yaml.safe_load(read_text(file, "the settings of"))
        names = set(parse_rewards(rewards_in(settings)))
    except (yaml.YAMLError, RewardError, TypeError, AttributeError):
        return None
    earlier = settings.get("lora")
    before = rewards_of_run(Path(earlier)) if isinstance(earlier, str) and Path(earlier) != folder else set()
    return None if before is None else names | before


def rewards_in(settings: dict[str, Any]) -> list[str]:
    """What judged the pictures of a run: its rewards, unless labels, pictures or an objective of sets took their
    place."""
    others = (settings.get("labels"), settings.get("images"), settings.get("objective", "instance") != "instance")
    return [] if any(others) else list(settings.get("reward", []))


def rewards_of_pictures(folder: Path) -> frozenset[str] | None:
    """The rewards that the model of a folder of `difftune sample` was trained on; None if the folder does not tell."""
    if not (folder / SAMPLES).is_file():
        return None
    try:
        settings = parse_json(read_text(folder / SAMPLES, "the pictures of"))["settings"]
        loras = settings["lora"]
        return rewards_of_model(settings.get("model"), loras)
    except (ValueError, KeyError, TypeError):  # the LoRA's folder is no longer there, or not told
        return None


def is_trained(reward: str, trained: Collection[str]) -> bool:
    """Whether a reward, or the one that it is made of, is among those: by the model that it names, else by its name."""
    return any(same(identity(reward), identity(name)) for name in trained)


class Identity(NamedTuple):
    """What makes a reward another one than the next."""

    name: str
    model: Any = None  # which its options name, if they do
    metric: Any = None


def same(one: Identity, other: Identity) -> bool:
    """Whether two are one network, whatever it is asked, or one reward of the same metric."""
    if one.model is not None and other.model is not None:
        return one.model == other.model
    return one == other


def identity(reward: str, more: Mapping[str, Any] | None = None) -> Identity:
    """That of a reward, or of the one that it is made of."""
    plain, options = spelled(reward)
    options |= more or {}
    inner = options.get("reward", options.get("encoder"))
    if isinstance(inner, str):
        own = options.get("options")
        return identity(inner, own if isinstance(own, Mapping) else None)
    return Identity(plain, options.get("model"), options.get("metric"))
