"""The guidance methods, related ones in one file; `catalogue.py` lists them all by name.

Most combine predictions of the network (CFG, APG), some ask for it with its attention changed (PAG, NAG), at another
point (Rectified-CFG++), or go around another method (Interval, Rescale). How a network is changed is in
`solvers/families`.
"""

from guidance.methods.catalogue import *  # noqa: F403
