"""The guidance methods, one family per file: those that combine predictions (CFG, APG) and those that perturb the
network's attention (PAG, SEG). How a network is perturbed is in `solvers/families`.
"""

from guidance.methods.catalogue import *  # noqa: F403
