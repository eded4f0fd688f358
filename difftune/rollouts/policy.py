"""The sampler as a policy: trajectories, and their transitions under other weights.

A stochastic step from x at `now` to x' at `then` is a Gaussian, pi(x' | x, c) = N(x'; mu(x, c), sigma^2 I), whose mean
is made of the guided prediction and whose deviation of the two levels alone. A trajectory keeps what every step started
from, so that the same step is taken again, under the same guidance, by the policy (with a gradient) and by its
reference. Means, deviations and log-probabilities are in float32 or better, whatever the network's precision: in
bfloat16 a ratio of probabilities is noise.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from math import log, pi, sin

import torch
from torch import Tensor

from difftune.errors import UserError
from solvers.denoiser import Path, Predict, Prediction, widen
from solvers.noise import Noise
from solvers.samplers.step import end, renoise, shift_of, transition

Kernel = Callable[[Prediction, Noise, Noise, float], tuple[Tensor, Tensor]]  # mean (B, ...) and deviation ()


def flow_transition(prediction: Prediction, now: Noise, then: Noise, a: float = 0.7) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and deviation () of a step of the SDE that has a flow's marginals, of t = now.sigma, dt < 0:

    s = a sqrt(t / (1 - t)),    mean = x (1 + s^2 dt / (2 t)) + v (1 + s^2 (1 - t) / (2 t)) dt,    std = s sqrt(-dt).

    At t = 1 the divisor 1 - t is that of the next level; the step to data (t' = 0) is the ODE's, with std 0.
    Flow-GRPO (https://arxiv.org/abs/2505.05470, eq. 9 and its released code).
    """
    return _flow_sde(prediction, now, then, a**2 * now.sigma / (now.alpha if now.alpha > 0 else then.alpha))


def dance_transition(prediction: Prediction, now: Noise, then: Noise, eta: float = 0.3) -> tuple[Tensor, Tensor]:
    """`flow_transition` with the same noise at all levels, s = eta: mean = x + (v + eta^2 eps / (2 t)) dt.

    DanceGRPO (https://arxiv.org/abs/2505.07818, and its released code). The step to data is the ODE's here too.
    """
    return _flow_sde(prediction, now, then, eta**2 * torch.ones_like(now.sigma))


def _flow_sde(prediction: Prediction, now: Noise, then: Noise, s2: Tensor) -> tuple[Tensor, Tensor]:
    """A step of dx = (v + s^2 eps / (2 t)) dt + s dw, which has the flow's marginals for any s^2."""
    t, dt = now.sigma, then.sigma - now.sigma
    v = prediction.eps - prediction.x0
    x = now.alpha * prediction.x0 + now.sigma * prediction.eps
    if then.sigma == 0:
        return x + v * dt, torch.zeros_like(t)
    half = s2 / (2 * t) * dt
    return x * (1 + half) + v * (dt + (1 - t) * half), (-s2 * dt).sqrt()


def cps_transition(prediction: Prediction, now: Noise, then: Noise, eta: float = 0.8) -> tuple[Tensor, Tensor]:
    """Coefficients-preserving sampling (https://arxiv.org/abs/2509.05952), for any alpha:

    std = sigma' sin(eta pi / 2),    mean = alpha' x0 + sqrt(sigma'^2 - std^2) eps.

    No noise remains at the end, so images are clean, at the price of a variance that is too small. eta = 1 makes
    all of the noise anew.
    """
    fresh = sin(eta * pi / 2)
    kept = (1 - fresh**2) ** 0.5
    return renoise(prediction, Noise(then.alpha, then.sigma * kept)), then.sigma * fresh


KERNELS: dict[str, Kernel] = {
    "ddim": transition,
    "flow": flow_transition,
    "dance": dance_transition,
    "cps": cps_transition,
}
ETAS = {"ddim": 1.0, "flow": 0.7, "dance": 0.3, "cps": 0.8}  # the papers' noise
FLOWS_ALONE = ("flow", "dance")  # kernels of a flow's SDE
AT_MOST_1 = ("ddim", "cps")  # kernels whose noise is a part of the level's


def check_eta(kernel: str, eta: float | None) -> None:
    """UserError for more noise than the kernel's levels hold: the mean of a step would not be a number."""
    if kernel in AT_MOST_1 and eta is not None and eta > 1:
        raise UserError(f"eta is {eta}: kernel {kernel!r} has no more noise than at 1, give at most that")


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

    No gradient flows to x. It is NaN or infinite if std is 0: such a step has no density.
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
    """T steps of a batch: what each started from, and where it led in the mean."""

    paths: Sequence[Path]  # T + 1, noisiest first
    means: Sequence[Tensor]  # (B, ...) of each step
    stds: Sequence[Tensor]  # () of each step

    @property
    def drawn(self) -> list[int]:
        """The steps that are random: one with deviation 0 has no density."""
        return [i for i, std in enumerate(self.stds) if std > 0]

    def log_prob(self, i: int) -> Tensor:
        """The log-probability (B,) per element of what step i drew; not finite if its deviation is 0."""
        return log_prob(self.paths[i + 1].x, self.means[i], self.stds[i])

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
    window: Container[int] | None = None  # the steps that add noise, of those that can; None: all. Others are the ODE's

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
        if self.window is not None and i not in self.window:
            return prediction, renoise(prediction, then), torch.zeros_like(then.sigma)
        return (prediction, *self.kernel(prediction, now, then, self.eta))

    def mean(self, predict: Predict, path: Path, i: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and deviation () of step i from `path`: what a stored transition is weighed by."""
        prediction, mean, std = self.step(predict, path, i)
        return self.shifted(prediction, mean, i), std

    def shifted(self, prediction: Prediction, mean: Tensor, i: int) -> Tensor:
        """The mean (B, ...) of step i with CFG++'s shift, as every step ends."""
        return mean + self.levels[i + 1].alpha * shift_of(prediction)

    @torch.no_grad()
    def sample(self, predict: Predict, x: Tensor, noise: Sequence[Tensor]) -> Trajectory:
        """A trajectory from x (B, ...) by `noise`, one tensor like x for each step; nothing carries a gradient."""
        if len(noise) != self.steps:
            raise UserError(f"{len(noise)} tensors of noise for {self.steps} steps: pass one for each")
        paths, means, stds = [Path(widen(x))], [], []
        for i, z in enumerate(noise):
            prediction, mean, std = self.step(predict, paths[-1], i)
            paths.append(end(paths[-1], mean + std * z, self.levels[i + 1], prediction))
            means.append(self.shifted(prediction, mean, i))
            stds.append(std)
        return Trajectory(paths, means, stds)
