"""The settings of every command: a field, its default, its range and its help text. Nothing here imports torch."""
