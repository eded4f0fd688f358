"""A reward that is made of another one: in parts of a batch, or smoothed."""
