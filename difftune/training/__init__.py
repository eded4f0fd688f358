"""The loop around every recipe: the trained weights, one optimiser step, optimisers, validation, the rules that stop a
run, the run folder of `difftune train`.
"""
