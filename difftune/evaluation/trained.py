"""Rewards that a model was trained on: they are no evidence of its quality."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from difftune.configs.written import CONFIG
from difftune.files.pictures import SAMPLES
from difftune.files.text import parse_json, read_text
from difftune.pipelines.opened import shares_of
from rewards.compose import parse_rewards
from rewards.errors import RewardError
from rewards.registry import spelled


def rewards_of_loras(loras: str | Iterable[str] | None) -> frozenset[str] | None:
    """The rewards that the runs in these folders (FOLDER or FOLDER=SHARE) were trained on; None if a folder does not
    tell."""
    found: set[str] = set()
    for folder in shares_of([loras] if isinstance(loras, str) else list(loras or [])):
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
        return rewards_of_loras(settings["lora"])
    except (ValueError, KeyError, TypeError):  # the LoRA's folder is no longer there, or not told
        return None


def is_trained(reward: str, trained: Collection[str]) -> bool:
    """Whether a reward, or the one that it is made of, is among those: by name, and by the model that it names."""
    return not identities(reward).isdisjoint(identity for name in trained for identity in identities(name))


def identities(reward: str) -> set[tuple[str, Any]]:
    """(name, model) of a reward, or of the one that it wraps."""
    plain, options = spelled(reward)
    inner = options.get("reward")
    return identities(inner) if isinstance(inner, str) else {(plain, options.get("model"))}
