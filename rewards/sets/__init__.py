"""Rewards of a set of images: distances and diversity."""
