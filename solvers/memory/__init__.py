"""How much memory a run takes, and how it is made to fit: measuring, planning, block checkpointing, offloading."""
