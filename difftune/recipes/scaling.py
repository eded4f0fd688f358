"""`reward_scaling`: several rewards brought to one scale before they are summed, whatever the recipe."""

from dataclasses import replace
from typing import Any

from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.lookup import reward_named, reward_weights
from difftune.recipes.catalogue import Recipe
from difftune.rollouts.session import Session
from difftune.training import validation
from rewards.compose import Scaling, WeightedSum, nominal_scale, scaled_sum
from rewards.registry import Reward


def scale_rewards(recipe: Recipe, session: Session[Any]) -> Session[Any]:
    """The session, whose reward is a sum of scaled ones; their running scales are the run's."""
    scaling = summed_as(recipe, session.config)
    if session.judge is None or scaling == "none":
        return session
    group = vars(session.config).get("num_images_per_prompt", 1)
    judge = scaled_sum(reward_named(session.judge, gradient=False), scaling, group)
    return replace(session, judge=replace(judge, scales=session.run.scales))  # type: ignore[call-arg]


def summed_as(recipe: Recipe, config: TrainingConfig) -> Scaling:
    """How the reward of a session is summed: not scaled if the recipe scales the parts in a group by itself."""
    return "none" if recipe.own_groups and config.reward_scaling == "group" else config.reward_scaling


def check_scaling(recipe: Recipe, config: TrainingConfig, reward: Reward | None) -> None:
    """UserError for a scaling that this recipe, or a reward, cannot have."""
    scaling = config.reward_scaling
    if scaling == "none":
        return
    if not validation.rewarded(config):
        raise UserError(f"reward_scaling is {scaling!r}, and this run has no reward: leave it out")
    if scaling == "running" and recipe.reward == "set":
        raise UserError("reward_scaling 'running' moves, and a set's reward is compared with itself: give 'range'")
    if scaling == "group":
        check_compared(recipe, config)
    if scaling == "range":
        named = reward_weights(config.reward) if reward is None else {type(reward).__name__: 1.0}
        for name in reward.rewards if isinstance(reward, WeightedSum) else named:
            nominal_scale(name)


def check_compared(recipe: Recipe, config: TrainingConfig) -> None:
    """UserError unless images of a prompt are compared with each other."""
    group = vars(config).get("num_images_per_prompt", 1)
    if recipe.reward in ("gradient", "set") or group < 2:
        more = "; give --num_images_per_prompt 2 or more" if recipe.name == "ddpo" else ""
        raise UserError(
            f"reward_scaling 'group' compares images of a prompt, and this {recipe.name} run does not: give 'range' or "
            f"'running'{more}"
        )
