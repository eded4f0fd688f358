"""How much memory a run takes, and how to make it fit."""
