"""How any recipe is run: settings that were checked become objects, and a folder gets what came of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from difftune import processes
from difftune.configs.training import TrainingConfig
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import Prompts, prompts_named
from difftune.lookup import over_frames, reward_named
from difftune.models import load as load_model
from difftune.recipes.card import model_card, trained_on
from difftune.recipes.catalogue import Recipe
from difftune.recipes.scaling import scale_rewards
from difftune.rollouts.session import open_session
from difftune.training import run_folder, validation
from difftune.training.report import write_report
from difftune.training.state import Metrics
from rewards.registry import Reward


@dataclass(frozen=True)
class Parts:
    """The model, the prompts and the reward that the settings name, loaded."""

    pipe: Any
    prompts: Prompts
    reward: Reward | None  # None if labels, pictures or an objective of sets take its place


def load_parts(recipe: Recipe, config: TrainingConfig, prompts: Prompts, pipe: Any, reward: Reward | None) -> Parts:
    """The model and the reward of the settings, except those that are given."""
    if reward is None and validation.rewarded(config):
        reward = reward_named(config.reward, gradient=recipe.reward == "gradient")
    reward = None if reward is None else over_frames(reward, config)
    return Parts(load_model(config.model) if pipe is None else pipe, prompts, reward)


def train_steps(
    recipe: Recipe, config: TrainingConfig, state: State | None, parts: Parts, say: Say | None
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    reference, say = recipe.wants_reference(config), say or keep_quiet
    with open_session(config, state, parts.pipe, parts.prompts, parts.reward, reference, say) as session:
        yield from recipe.train(scale_rewards(recipe, session))


def train_unsaved(
    recipe: Recipe, config: TrainingConfig, state: State | None, pipe: Any, reward: Reward | None, say: Say | None
) -> Iterator[tuple[Metrics, State]]:
    """`difftune.recipes.train`, of settings that were checked."""
    prompts = prompts_named(config.prompts, config.seed)
    return train_steps(recipe, config, state, load_parts(recipe, config, prompts, pipe, reward), say)


def train_saved(
    recipe: Recipe, config: TrainingConfig, show: Say | None, pipe: Any, reward: Reward | None
) -> dict[str, Any]:
    """`difftune.recipes.train_in_folder`, of settings that were checked."""
    prompts = prompts_named(config.prompts, config.seed)
    with run_folder.begin_run(config, show) as state:
        parts = load_parts(recipe, config, prompts, pipe, reward)
        steps = train_steps(recipe, config, state, parts, run_folder.resolving(config, show))
        card = partial(model_card, recipe, config, parts.pipe)
        found = run_folder.run_in_folder(config, steps, state, parts.pipe, card, parts.reward)
        if processes.process().is_main_process:
            write_report(recipe.name, config, parts.pipe, trained_on(config), found["seconds"])
        if recipe.finish and processes.process().is_main_process:
            found |= recipe.function(recipe.finish)(config, parts.pipe, parts.prompts, parts.reward)
        return found


def keep_quiet(line: str) -> None:
    """Say nothing."""
