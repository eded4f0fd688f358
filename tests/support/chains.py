"""Problems of search with exact answers: a finite chain, and a Gaussian under a linear reward, both discretised."""

from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from guidance.guided import guided
from guidance.methods.catalogue import Plain
from guidance.search.problem import Problem, RowCounter
from solvers.denoiser import Path, Prediction
from solvers.exact import Gaussian
from solvers.noise import Noise, noise

F64 = {"dtype": torch.float64}
STATES, STEPS = 12, 5


def dirichlet(n: int, generator: torch.Generator) -> Tensor:
    """Rows (n, STATES) of Dirichlet(1/2): squares of normals, normalised."""
    squares = torch.randn(n, STATES, generator=generator, **F64) ** 2
    return squares / squares.sum(1, keepdim=True)


DRAWN = torch.Generator().manual_seed(3)
FIRST = dirichlet(1, DRAWN)[0]
MATRICES = [0.7 * torch.eye(STATES, **F64) + 0.3 * dirichlet(STATES, DRAWN) for _ in range(STEPS)]  # sticky
REWARDS = torch.randn(STATES, generator=DRAWN, **F64)


class Chain(Problem):
    """x (B, 2) holds the number of a state, which steps by the rows of `MATRICES`, and its reward. Before the end, what
    is known of a state, and scored, is the reward expected one step on."""

    def start(self, group: int, *key: int, n: int = 1) -> Path:
        return Path(entered(FIRST.expand(n, -1), self.noise(group, *key, n=n)))

    def predicted(self, path: Path, i: int, groups: Tensor, expert: str | None = None) -> Prediction:
        self._spend("nfe", groups, torch.ones((), dtype=torch.int64), self.nfe_budget)
        expected = MATRICES[i] @ REWARDS
        estimate = torch.stack([path.x[:, 0], expected[path.x[:, 0].long()]], 1)
        return Prediction(estimate, path.x)

    def move(self, path: Path, prediction: Prediction, i: int, noise: Tensor) -> Path:
        return Path(entered(MATRICES[i][path.x[:, 0].long()], noise), prediction.x0)


def entered(shares: Tensor, noise: Tensor) -> Tensor:
    """States and rewards (B, 2), drawn by shares (B, STATES) with the first of two normals (B, 2)."""
    states = located(shares, noise[:, :1])
    return torch.cat([states, REWARDS[states.long()]], 1)


def located(shares: Tensor, noise: Tensor) -> Tensor:
    """One state (B, 1) for each row of shares (B, STATES), by the uniform that unit normal noise (B, 1) stands for."""
    uniform = torch.special.ndtr(noise.double())
    return torch.searchsorted(shares.cumsum(1), uniform, right=True).clamp(max=STATES - 1).double()


def chain(groups: int = 1, **options) -> Chain:
    levels = [noise(1.0, float(STEPS - i)) for i in range(STEPS + 1)]
    return Chain(levels, none, lambda x0, _: x0[:, 1], (2,), range(groups), **F64, **options)


def none(groups: Tensor):
    raise AssertionError("the chain predicts by itself")


def chain_target(inverse_temperature: float = 1.0) -> tuple[Tensor, float]:
    """pi(x0) exp(lambda r) / Z (STATES,), and Z."""
    law = FIRST
    for matrix in MATRICES:
        law = law @ matrix
    tilted = law * (inverse_temperature * REWARDS).exp()
    return tilted / tilted.sum(), float(tilted.sum())


def edm(high: float, low: float, steps: int) -> list[Noise]:
    """EDM's grid with rho = 7, alpha = 1, then 0: `steps` steps."""
    ramp = torch.linspace(0, 1, steps, **F64)
    return [*(noise(1.0, s) for s in (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7), noise(1, 0)]


@dataclass(frozen=True)
class Linear:
    """Data N(mean, var) under DDIM with eta = 1 and x_T ~ N(0, sigma_T^2); the reward is slope * x0."""

    mean: float = 0.5
    var: float = 1.0
    slope: float = 1.0
    high: float = 10.0
    low: float = 0.05
    steps: int = 10

    @property
    def levels(self) -> list[Noise]:
        return edm(self.high, self.low, self.steps)

    def problem(self, seeds=(0,), **options) -> Problem:
        exact = Gaussian(torch.tensor([self.mean], **F64), self.var**0.5)

        def predict(groups):
            return guided(exact, Plain(), {"cond": {"group": groups}}, counter=RowCounter())

        reward = lambda x0, groups: self.slope * x0[:, 0]  # noqa: E731
        return Problem(self.levels, predict, reward, (1,), seeds, **{**F64, **options})

    def law(self, inverse_temperature: float = 0.0) -> tuple[float, float, float]:
        """Mean and variance of the sampler's x0 under exp(lambda r), and log Z: x' = k x + c + sqrt(v) z throughout."""
        s, m = self.var, self.mean
        mean, var = 0.0, self.high**2
        sigmas = [float(at.sigma) for at in self.levels]
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            g = then**2 / now**2
            k = (1 - g) * s / (s + now**2) + g
            c = (1 - g) * now**2 * m / (s + now**2)
            mean, var = k * mean + c, k**2 * var + then**2 * (1 - g)
        tilt = inverse_temperature * self.slope
        return mean + tilt * var, var, tilt * mean + tilt**2 * var / 2


def log_z(weighted, groups: int) -> Tensor:
    """log of the estimate of Z (G,) of each group, from the weights of its samples."""
    rows = [weighted.log_weight[weighted.groups == g] for g in range(groups)]
    return torch.stack([row.logsumexp(0) - torch.tensor(float(len(row))).log() for row in rows])


def moments(weighted) -> tuple[float, float]:
    """Weighted mean and variance of one group's samples (S, 1)."""
    shares = weighted.log_weight.softmax(0)
    mean = (shares * weighted.x0[:, 0]).sum()
    return float(mean), float((shares * (weighted.x0[:, 0] - mean) ** 2).sum())


def histogram(x0: Tensor, log_weight: Tensor) -> Tensor:
    """Weighted shares (STATES,) of the chain's last states."""
    return torch.zeros(STATES, **F64).index_add(0, x0[:, 0].long(), log_weight.softmax(0))


assert abs(exp(Linear().law(1.0)[2]) - exp(0.785647)) < 1e-5  # the sheet's own value
