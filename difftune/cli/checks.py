"""What commands ask of prompts and rewards before any work."""

from collections.abc import Sequence

import click


def spoken(prompts: Sequence[str]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise click.UsageError(f"prompt {i + 1} of {len(prompts)} is empty: say what to draw")
