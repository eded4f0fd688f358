"""The training of the embedded models: one file for each stage, and what the stages share."""
