"""Rewards of a set of images as a whole: its distance to exemplars (Fréchet, MMD), its diversity (Vendi).

To be trained on, a set reward also needs an entry in `OBJECTIVES` of `difftune/recipes/set_objectives.py`.
"""
