"""Search at inference on a pipeline: the Python call, the experts, the run on disk."""
