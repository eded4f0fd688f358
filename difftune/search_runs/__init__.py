"""Search at inference on a diffusers pipeline: the Python call, the experts, the run folder of `difftune search`. The
search methods themselves are in `guidance/search`.
"""
