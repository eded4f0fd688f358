"""`difftune demo`: the main job end to end on the embedded models, as one HTML report."""
