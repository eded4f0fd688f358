"""What `scripts/check_parity.py` compares: the published checkpoints, and their authors' own code."""
