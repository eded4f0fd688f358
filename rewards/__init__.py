"""Rewards: images and prompts to scores."""

__distribution__ = "difftune"
