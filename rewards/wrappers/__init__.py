"""Rewards that are made of another one: on parts of a batch, or smoothed."""
