"""A whole sampling run, and the modes of the gradient through it (checkpointed, truncated, adjoint, reversible)."""

from solvers.rollout.modes import rollout

__all__ = ["rollout"]
