"""Surrogate gradients by name, as `--gradient leapalign[alpha=0.3]`: the whole run is sampled without a graph, and the
gradient is that of a few network calls, which are drawn anew for each optimiser step.

What each one computes is in `solvers.rollout.surrogate`; here are its settings, with the papers' values, and its draw.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from difftune.configs.recipes import AlignPropConfig
from difftune.errors import UserError
from difftune.lookup import at_least, known
from difftune.pipelines.engine import check_offloading, try_gradient
from difftune.recipes.reward_gradient import Modes
from rewards.registry import spelled
from solvers.noise import Noise, flow, grid
from solvers.ranges import Count, NotNegative, Positive, Ranged, Share, Whole


class Surrogate(Protocol):
    """A way to draw the steps that carry gradient."""

    @property
    def least(self) -> int:
        """Sampler steps that it needs."""

    def draw(self, draw: random.Random, levels: Sequence[Noise], step: int = 0) -> str:
        """A mode of the engine, of a sampler with these levels, for an optimiser step."""


@dataclass(frozen=True)
class FlowBP(Ranged):
    """FlowBP (https://arxiv.org/abs/2606.11075): some steps, each by itself, the network's output held at all of them.

    active: their number, drawn without replacement. bias: step i is drawn with weight (i + 1)^bias. rho: how much the
    gradient is scaled up for the steps that are left out, 0 to 1. alpha: above 0, of two uniform steps the later one
    bridges: it passes this share of the gradient to the steps between the two.
    """

    active: Count = 4
    bias: NotNegative = 1.0
    rho: Share = 0.5
    alpha: Share = 0.0
    least = 2

    def draw(self, draw: random.Random, levels: Sequence[Noise], step: int = 0) -> str:
        widths = [time_of(now) - time_of(then) for now, then in zip(levels[:-1], levels[1:], strict=True)]
        count = len(widths)
        if not self.alpha:
            kept = self.some(draw, range(count), self.active)
            return f"truncated:{digits(kept, count)},{self.scale(widths, kept):g}:held"
        start, join = sorted(draw.sample(range(count), 2))
        early = round(self.active * (join - start) / (count - start))
        before = self.some(draw, range(start, join), min(early, self.active - 1))
        after = self.some(draw, range(join + 1, count), self.active - 1 - len(before))
        kept = [*before, join, *after]
        scale = self.scale(widths[start:], [i - start for i in kept])
        return f"truncated:{digits(kept, count)},{scale:g},{join},{self.alpha:g}:bridge"

    def some(self, draw: random.Random, steps: range, count: int) -> list[int]:
        """So many of the steps, or all, by their weights."""
        left, chosen = list(steps), list[int]()
        while left and len(chosen) < count:
            (step,) = draw.choices(left, [(i + 1) ** self.bias for i in left])
            left.remove(step)
            chosen.append(step)
        return sorted(chosen)

    def scale(self, widths: Sequence[float], kept: Sequence[int]) -> float:
        """1 + rho (the width of all steps / that of the kept ones - 1)."""
        return 1 + self.rho * (sum(widths) / sum(widths[i] for i in kept) - 1)


@dataclass(frozen=True)
class LeapAlign(Ranged):
    """LeapAlign (https://arxiv.org/abs/2604.15311): two straight steps in place of all, between two that are drawn.

    alpha: the share of the gradient that goes through the second step's input. tau: the least distance, above 0, by
    which a sample's gradient is divided, which is that of the two steps from the run.
    """

    alpha: Share = 0.3
    tau: Positive = 0.1
    least = 2

    def draw(self, draw: random.Random, levels: Sequence[Noise], step: int = 0) -> str:
        start, join = sorted(draw.sample(range(len(levels) - 1), 2))
        return f"truncated:{start},{join},{self.alpha:g},{self.tau:g}:leap"


@dataclass(frozen=True)
class DirectAlign(Ranged):
    """Direct-Align, SRPO's way to a gradient (https://arxiv.org/abs/2509.06942): the image is noised again by its own
    noise to a level that is drawn, and one step of the network from there is judged by the image that is found again.

    up: every so many optimiser steps that step goes up in noise, and the reward counts against it, as a step up moves
    the image the other way; SRPO has 2, every second one, and 0 is never. lowest, highest: the times t of the levels,
    1 for noise and 0 for data: SRPO warns of t above .99, and of the last ones. The first and the last level of a run
    are not among them.
    """

    up: Whole = 2
    lowest: Share = 0.0
    highest: Share = 0.99
    least = 3

    def draw(self, draw: random.Random, levels: Sequence[Noise], step: int = 0) -> str:
        rising = bool(self.up) and step % self.up == 0
        last = len(levels) - 2  # the noisiest and the clean level are no place to find an image again from
        within = [i for i in range(1, last + 1) if self.lowest <= time_of(levels[i]) <= self.highest]
        pairs = [(i, i - 1 if rising else i + 1) for i in within if (i > 1 if rising else i < last)]
        if not pairs:
            raise UserError(
                f"direct-align has no level of the run between lowest, {self.lowest:g}, and highest, {self.highest:g}, "
                "but the first and the last ones: give it more room, or more sampler steps"
            )
        now, then = draw.choice(pairs)
        return f"truncated:{now},{then}{',-1' if rising else ''}:direct"


SURROGATES: dict[str, type] = {"flowbp": FlowBP, "leapalign": LeapAlign, "direct-align": DirectAlign}


def time_of(at: Noise) -> float:
    """t of the flow that a level is one of: sigma / (alpha + sigma)."""
    return float(at.sigma / (at.alpha + at.sigma))


def digits(kept: Sequence[int], count: int) -> str:
    return "".join("01"[i in kept] for i in range(count))


def is_surrogate(gradient: str | None) -> bool:
    """Whether a gradient is named that is drawn anew for each optimiser step."""
    return gradient is not None and gradient.partition("[")[0] in SURROGATES


def surrogate_named(gradient: str) -> Surrogate:
    """The surrogate of "NAME" or "NAME[OPTION=VALUE, ...]". UserError for an option that is not known."""
    name, options = spelled(gradient)
    kind = SURROGATES[known("surrogate gradient", name, SURROGATES)]
    for option in options:
        known(f"option of {name}", option, [f.name for f in fields(kind)])
    return kind(**options)


def drawn_surrogates(config: AlignPropConfig, levels: Sequence[Noise]) -> Modes:
    """The modes of a run: the steps are drawn by the seed, the same in every process."""
    surrogate = surrogate_named(config.gradient or "")

    def of(step: int) -> str:
        return surrogate.draw(random.Random(f"{config.seed} {step} surrogate"), levels, step)

    return Modes(of, of(0), f"{surrogate}, drawn anew for each optimiser step")


def check_surrogate(config: AlignPropConfig) -> None:
    """UserError for a surrogate that is not known, or that does not work with the other settings."""
    surrogate = surrogate_named(config.gradient or "")
    at_least(surrogate.least, num_inference_steps=config.num_inference_steps)
    if config.sampler != "euler":
        raise UserError(
            f"gradient {config.gradient!r} is of Euler's steps, not of {config.sampler!r}: leave sampler out"
        )
    for step in range(2):
        mode = surrogate.draw(random.Random(0), grid(flow, config.num_inference_steps), step)
        check_offloading(config.offload, mode)
        try_gradient(mode, config.num_inference_steps, "weights")
