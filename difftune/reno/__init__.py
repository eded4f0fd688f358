"""ReNO: optimise the initial noise of a picture on a reward."""
