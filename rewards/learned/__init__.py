"""Rewards that are trained networks, and their preprocessing."""
