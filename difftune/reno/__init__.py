"""ReNO: optimise the initial noise of a picture on a reward. The objective, the regularizers of the noise, the
optimisers with and without a gradient, the run folder of `difftune optimize`.

A new regulariser goes into `REGULARIZERS` of `regularizers.py`; its name also goes into the Literal of
`difftune/configs/noise.py`.
"""
