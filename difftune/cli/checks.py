"""What commands ask of prompts and rewards before any work."""

from collections.abc import Sequence

import click


def spoken(prompts: Sequence[str]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise click.UsageError(f"prompt {i + 1} of {len(prompts)} is empty: say what to draw")


def known_rewards(terms: Sequence[str]) -> Sequence[str]:
    """The terms, if each is a known reward with a number; a usage error otherwise."""
    from rewards.compose import parse_rewards

    try:
        parse_rewards(terms)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return terms
