"""The loop around every recipe: what is trained, one optimiser step, the run folder, validation."""
