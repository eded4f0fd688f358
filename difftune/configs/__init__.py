"""The settings of every command, as documented dataclasses; nothing here imports torch."""
