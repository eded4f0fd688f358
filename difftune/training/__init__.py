"""The loop around every recipe: the trained weights, one optimiser step, optimisers, validation, stopping early
(the rule itself is `rewards/monitor.py`), the run folder of `difftune train`.
"""
