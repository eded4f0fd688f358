"""One training algorithm per file (reward gradients, policy gradients, preferences): its loss, its step, its checks.

`RECIPES` lists them; `train` runs one.

Importing this imports no torch: a recipe's functions are imported when they are called.
"""

from typing import TYPE_CHECKING, Any

from difftune.configs.training import TrainingConfig
from difftune.recipes.catalogue import RECIPES, Recipe, recipe_of

if TYPE_CHECKING:
    from difftune.files.checkpoint import Say, State
    from difftune.recipes.catalogue import Steps
    from rewards.registry import Reward

__all__ = ["RECIPES", "Recipe", "check_recipe", "recipe_of", "train", "train_in_folder"]


def check_recipe(config: TrainingConfig, pipe: Any = None, reward: "Reward | None" = None) -> None:
    """UserError, in one sentence, for the first invalid setting; nothing heavy is loaded."""
    from difftune.recipes.scaling import check_scaling
    from difftune.training.checks import check_reward, check_training

    recipe = recipe_of(config)
    check_training(config, pipe)
    recipe.check(config)
    check_reward(config, reward, gradient=recipe.reward == "gradient")
    check_scaling(recipe, config, reward)


def train(
    config: TrainingConfig,
    state: "State | None" = None,
    pipe: Any = None,
    reward: "Reward | None" = None,
    say: "Say | None" = None,
) -> "Steps":
    """Train by the recipe whose Config it is: metrics and state after each optimiser step, from that of `state` on.

        for metrics, state in train(AlignPropConfig(max_train_steps=10)):
            print(metrics["step"], metrics["reward_mean"])

    pipe, reward: those that config names, unless given. The pipeline gets the adapter, and keeps it. say: is told what
    was resolved, a line each. Nothing is written; see `train_in_folder`.
    Raises UserError, at once, for invalid settings; later RunError, if rewards or gradients were not finite
    in more steps than `config.max_skipped_steps`: the weights are then those of the state that came last.
    """
    check_recipe(config, pipe, reward)
    from difftune.recipes.running import train_unsaved

    return train_unsaved(recipe_of(config), config, state, pipe, reward, say)


def train_in_folder(
    config: TrainingConfig, show: "Say | None" = None, pipe: Any = None, reward: "Reward | None" = None
) -> dict[str, Any]:
    """Train in `config.output_dir`, as `difftune train` does, and return a summary.

        train_in_folder(AlignPropConfig(output_dir="out"))["reward_last"]

    The folder gets metrics, checkpoints, weights and a model card; `config.resume_from_checkpoint` goes on from one.
    show: is told what people should read, instead of stderr. pipe, reward, errors: as for `train`.
    """
    check_recipe(config, pipe, reward)
    from difftune.recipes.running import train_saved

    return train_saved(recipe_of(config), config, show, pipe, reward)
