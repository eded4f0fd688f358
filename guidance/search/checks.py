"""Checks that the settings of several particle methods share; each raises ValueError in one sentence."""

from solvers.errors import UserError


def check_particles(particles: int | None) -> None:
    if particles is not None and particles < 1:
        raise UserError(f"particles is {particles}: there must be at least 1")


def check_temperature(inverse_temperature: float, most: float = 1e6) -> None:
    if not 0 <= inverse_temperature <= most:
        raise UserError(f"inverse_temperature is {inverse_temperature}: it must be between 0 and {most:g}")


def check_candidates(candidates: int) -> None:
    if candidates < 1:
        raise UserError(f"candidates is {candidates}: there must be at least 1")
