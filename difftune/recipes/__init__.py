"""The training algorithms, one per file: its loss, its step, its checks."""
