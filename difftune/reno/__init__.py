"""ReNO: optimise the initial noise of a picture on a reward. The objective, the regularizers of the noise, the
optimisers with and without a gradient, the run folder of `difftune optimize`.
"""
