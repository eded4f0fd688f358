"""Rewards of a set of images as a whole: its distance to exemplars (Fréchet, MMD), its diversity (Vendi)."""
