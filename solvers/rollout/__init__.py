"""A whole sampling run, and the gradient through it."""

from solvers.rollout.modes import rollout

__all__ = ["rollout"]
