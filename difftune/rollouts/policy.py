"""The sampler as a policy: trajectories, and their transitions under other weights.

A stochastic step from x at `now` to x' at `then` is a Gaussian, pi(x' | x, c) = N(x'; mu(x, c), sigma^2 I), whose mean
is made of the guided prediction and whose deviation of the two levels alone. A trajectory keeps what every step started
from, so that the same step is taken again, under the same guidance, by the policy (with a gradient) and by its
reference. Means, deviations and log-probabilities are in float32 or better, whatever the network's precision: in
bfloat16 a ratio of probabilities is noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

from difftune.errors import UserError
from solvers.denoiser import Path, Predict, Prediction, widen
from solvers.noise import Noise
from solvers.samplers.step import end, shift_of, transition

Kernel = Callable[[Prediction, Noise, Noise, float], tuple[Tensor, Tensor]]  # mean (B, ...) and deviation ()


def flow_transition(prediction: Prediction, now: Noise, then: Noise, a: float = 0.7) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and deviation () of a step of the SDE that has a flow's marginals, of t = now.sigma, dt < 0:

    s = a sqrt(t / (1 - t)),    mean = x (1 + s^2 dt / (2 t)) + v (1 + s^2 (1 - t) / (2 t)) dt,    std = s sqrt(-dt).

    At t = 1 the divisor 1 - t is that of the next level; the step to data (t' = 0) is the ODE's, with std 0.
    Flow-GRPO (https://arxiv.org/abs/2505.05470, eq. 9 and its released code).
    """
    t, dt = now.sigma, then.sigma - now.sigma
    v = prediction.eps - prediction.x0
    x = now.alpha * prediction.x0 + now.sigma * prediction.eps
    if then.sigma == 0:
        return x + v * dt, torch.zeros_like(t)
    s2 = a**2 * t / (now.alpha if now.alpha > 0 else then.alpha)
    half = s2 / (2 * t) * dt
    return x * (1 + half) + v * (dt + (1 - t) * half), (-s2 * dt).sqrt()


KERNELS: dict[str, Kernel] = {"ddim": transition, "flow": flow_transition}
ETAS = {"ddim": 1.0, "flow": 0.7}  # the papers' noise


def kernel_of(prediction_type: str) -> str:
    """The kernel for a network: DDIM's, or a flow's SDE for one that predicts a flow."""
    return "flow" if prediction_type == "flow" else "ddim"


# ------------------------------------------------------------------------------------------------ log-probabilities


def per_element(x: Tensor) -> Tensor:
    """The mean of (B, ...) over all but the batch, (B,).

    Log-probabilities are means over the latent's elements, as in every published code of this family: with sums, a
    clip range of 1e-4 would stop all learning.
    """
    return x.flatten(1).mean(1)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) per element, (B,): the mean of -(x - mean)^2 / (2 std^2) - ln std - ln(2 pi) / 2.

    No gradient flows to x. It is NaN or infinite where std is 0: such a step has no density.
    """
    return per_element(-((widen(x.detach()) - mean) ** 2) / (2 * std**2)) - std.log() - log(2 * pi) / 2


def log_ratio(x: Tensor, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) / N(x; reference, std^2) per element, (B,), without the constants of either."""
    x = widen(x.detach())
    return per_element((x - reference) ** 2 - (x - mean) ** 2) / (2 * std**2)


def kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(reference, std^2)) per element, (B,): the mean of (mean - reference)^2 / (2 std^2)."""
    return per_element((mean - reference) ** 2) / (2 * std**2)


# ------------------------------------------------------------------------------------------------ trajectories


@dataclass(frozen=True)
class Trajectory:
    """T steps of a batch: what each started from, and the probability that it ended where it did."""

    paths: Sequence[Path]  # T + 1, noisiest first
    log_probs: Sequence[Tensor]  # (B,) of each step, per element; not finite where the deviation is 0
    stds: Sequence[Tensor]  # () of each step

    @property
    def drawn(self) -> list[int]:
        """The steps that are random: one with deviation 0 has no density."""
        return [i for i, std in enumerate(self.stds) if std > 0]

    @property
    def end(self) -> Tensor:
        """The latents (B, ...) of the images."""
        return self.paths[-1].x


@dataclass(frozen=True)
class Policy:
    """A stochastic sampler over fixed levels. `eta` is DDIM's (1 is DDPM), or the a of a flow's SDE; above 0."""

    kernel: Kernel
    eta: float
    levels: Sequence[Noise]  # T + 1, noisiest first

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise UserError(f"eta is {self.eta}: a sampler without noise has no log-probability, so give it above 0")

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def step(self, predict: Predict, path: Path, i: int) -> tuple[Prediction, Tensor, Tensor]:
        """The prediction at step i, and the mean (B, ...) and deviation () of where it leads, without CFG++'s shift."""
        now, then = self.levels[i], self.levels[i + 1]
        prediction = predict(path, now)
        return (prediction, *self.kernel(prediction, now, then, self.eta))

    def mean(self, predict: Predict, path: Path, i: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and deviation () of step i from `path`: what a stored transition is weighed by."""
        prediction, mean, std = self.step(predict, path, i)
        return mean + self.levels[i + 1].alpha * shift_of(prediction), std

    @torch.no_grad()
    def sample(self, predict: Predict, x: Tensor, noise: Sequence[Tensor]) -> Trajectory:
        """A trajectory from x (B, ...) by `noise`, one tensor like x for each step; nothing carries a gradient."""
        if len(noise) != self.steps:
            raise UserError(f"{len(noise)} tensors of noise for {self.steps} steps: pass one for each")
        paths, log_probs, stds = [Path(widen(x))], [], []
        for i, z in enumerate(noise):
            prediction, mean, std = self.step(predict, paths[-1], i)
            paths.append(end(paths[-1], mean + std * z, self.levels[i + 1], prediction))
            shifted = mean + self.levels[i + 1].alpha * shift_of(prediction)
            log_probs.append(log_prob(paths[-1].x, shifted, std))
            stds.append(std)
        return Trajectory(paths, log_probs, stds)
