"""The samplers: one step from a noise level to the next, of order 1 to 4."""
