r"""Feynman-Kac correctors: weights that make a mixture of scores sample the law that it stands for.

Experts q_i with exponents b_i, S = sum b_i grad log q_i, B = sum b_i, and a tilt rho. At every noise level the weighted
particles stand for

    p  ~  prod q_i^{b_i} exp(rho):    CFG of scale w is b = (w, 1 - w); annealing is one expert, b = beta; a product is
                                      b = (beta, beta).

In k = sigma / alpha and x / alpha, with -dk > 0, they move with noise zeta and gain weight whatever zeta is,

    dx     = -dk ((1 + zeta^2) k S + zeta^2 k grad rho) + zeta sqrt(-2 k dk) dW,
    dlog w = -dk / k (|sum b_i eps_i|^2 - sum b_i |eps_i|^2) + drho along the probability flow of S:

propositions 3.1 to 3.4 of https://arxiv.org/abs/2503.02819 in one.

    for state in fkc(problem, FKC(particles=8)): ...
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from guidance.guided import GuidedPredict
from guidance.methods.cfg import CFG, Plain
from guidance.search.population import STEP, Kind, Population, resampled, runs, size_for
from guidance.search.problem import PredictOf, Problem, RowCounter, Saved, State
from guidance.search.smc import Particles, check_resampling, reweight
from solvers.denoiser import Path, Predict, Prediction
from solvers.errors import Caution, UserError
from solvers.noise import Noise
from solvers.ranges import Many, NotNegative, Positive, Range, Ranged, Share
from solvers.samplers.step import end, renoise, shrinkage, transition

BOUNDARY = 1e-3  # of zeta^2 around the least that an annealing can have

Exponents = Mapping[str, float]  # expert -> b_i
Said = Mapping[str, Prediction]  # expert -> its prediction at the same x

# ------------------------------------------------------------------------------------------------ samplers


class Sampler(NamedTuple):
    """How S is followed.

    move(mixed, now, then, zeta): mean (B, ...) and deviation () of the step. weight(now, then): the coefficients c of
    |eps|^2 and c (alpha / sigma)^2 of |x0|^2 in `log_weight`. They do not depend on zeta.
    """

    move: Callable[[Prediction, Noise, Noise, float], tuple[Tensor, Tensor]]
    weight: Callable[[Noise, Noise], tuple[Tensor, Tensor]]


def _ddim_weight(now: Noise, then: Noise) -> tuple[Tensor, Tensor]:
    """c = ((k/k')^2 - 1) / 2, that of the density ratio at zeta = 1."""
    snr = ((then.alpha / then.sigma) ** 2 - (now.alpha / now.sigma) ** 2) / 2
    return (shrinkage(now, then) ** -2 - 1) / 2, snr


def _euler_move(mixed: Prediction, now: Noise, then: Noise, zeta: float) -> tuple[Tensor, Tensor]:
    """x'/alpha' = x/alpha - (1 + zeta^2) (k - k') eps + zeta sqrt(2 k (k - k')) noise; ddim's step if that is
    infinite, from pure noise, and if it would leave noise in the data."""
    if now.alpha == 0 or then.sigma == 0:
        return transition(mixed, now, then, min(zeta, 1.0))
    k, part = now.sigma / now.alpha, 1 - shrinkage(now, then)
    mean = renoise(mixed, Noise(then.alpha, then.alpha * k * (1 - (1 + zeta**2) * part)))
    return mean, then.alpha * k * zeta * (2 * part).sqrt()


def _euler_weight(now: Noise, then: Noise) -> tuple[Tensor, Tensor]:
    """c = 1 - k'/k."""
    if now.alpha == 0:
        return _ddim_weight(now, then)
    c = 1 - shrinkage(now, then)
    return c, c * (now.alpha / now.sigma) ** 2


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(transition, _ddim_weight),
    "euler-maruyama": Sampler(_euler_move, _euler_weight),
}

# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class FKC(Ranged):
    """Feynman-Kac correctors: samples of a product of powers of experts, tilted by a reward.

    exponents: b_i by the experts' names (the problem's experts, or its conditions); None reads them off the problem's
    guidance, which is CFG of one number or none. particles: K of a run; None takes what the budget pays for. sampler:
    "ddim" with churn zeta, or "euler-maruyama" with noise zeta. zeta: None is the problem's eta; for B above 1, what
    two seeds give differs by a finite variance only if zeta^2 > 2 (B - 1) / B.

    start, stop: the share of the run in which the experts give weight. centred: their log-weights lose their mean in
    the group; clamp: the largest size of a step's, afterwards. All four are for images; `EXACT` turns them off.
    threshold: resample below that share of K in effective sample size; None at every step that gives weight.

    inverse_temperature: lambda of the tilt rho = lambda beta r; 0 is no tilt. beta is 1 - sqrt(k / ramp), 0 above
    k = ramp, and 1 at the last level. reads: r of the estimate "x0", or of the noisy "x" / alpha. tilt: "free" needs no
    gradient, leaves the moves alone and weighs by the change of rho over them; "difference" moves along grad rho and
    weighs by the change of rho along the probability flow; "gradient" by its derivative there, for reads="x" only.
    """

    exponents: Exponents | None = None
    particles: Many | None = None
    sampler: Literal["ddim", "euler-maruyama"] = "ddim"
    zeta: NotNegative | None = None
    start: Share = 0.2
    stop: Share = 0.8
    clamp: Positive | None = 2.0
    centred: bool = True
    threshold: Share | None = 0.5
    resampling: str = "systematic"
    inverse_temperature: Annotated[float, Range(0, 1_000_000)] = 0.0
    ramp: Positive = 10.0
    reads: Literal["x0", "x"] = "x0"
    tilt: Literal["free", "difference", "gradient"] = "free"

    def __post_init__(self):
        if self.reads not in TILTS:
            raise UserError(
                f"the tilt reads {self.reads!r}; known: {', '.join(TILTS)} (the clean estimate, or the noisy x)"
            )
        super().__post_init__()
        check_resampling(self.resampling, self.threshold)
        if self.start > self.stop:
            raise UserError(f"weights from {self.start} to {self.stop} of the run: start must be at most stop")
        _check_tilt(self)


EXACT: dict[str, float | None] = {"start": 0.0, "stop": 1.0, "clamp": None, "centred": False}
TILTS = {"x0": ("free", "difference"), "x": ("free", "difference", "gradient")}


def _check_tilt(config: FKC) -> None:
    if config.tilt not in TILTS[config.reads]:
        raise UserError(f"no tilt {config.tilt!r} that reads {config.reads!r}; take {' or '.join(TILTS[config.reads])}")


def anneal(beta: float, name: str = "cond") -> dict[str, float]:
    """The exponents of q^beta."""
    return {name: beta}


def geometric(scale: float) -> dict[str, float]:
    """The exponents of q_cond^scale q_uncond^(1 - scale), the law that CFG's score is taken for."""
    return {"cond": scale, "uncond": 1 - scale}


def product(*names: str, beta: float = 1.0) -> dict[str, float]:
    """The exponents of (q_1 q_2 ...)^beta."""
    return dict.fromkeys(names, beta)


# ------------------------------------------------------------------------------------------------ the method


def fkc(problem: Problem, config: FKC, saved: Saved | None = None) -> Iterator[State]:
    """Feynman-Kac correctors over a problem.

    Costs S NFEs for each expert and particle, and one reward call a particle. A tilt costs a reward call (and unless it
    is "free" a backward pass) at each step below its ramp, and "difference" one reward call more, with the experts once
    more if it reads x0.

    Raises ValueError without noise, for guidance other than CFG of a number, for exponents of no known expert or whose
    sum is not above 0, and for an annealing whose noise no weights can make up for.
    """
    problem, exponents = mixture(problem, config)
    check_noise(problem, config, exponents)
    nfe, calls = costs(problem, config, exponents)
    size = size_for(problem, config.particles, nfe, calls)
    return runs(problem, Kind("fkc", partial(_begun, problem, config, exponents), [size], nfe, calls), saved)


def _begun(problem: Problem, config: FKC, exponents: Exponents, population: Population) -> Particles:
    """`fkc_step`, whose first has the law of the target at the top, N(0, sigma^2 / B)."""
    if population.step == 0:
        particles = population.particles
        path = replace(particles.path, x=particles.path.x / total(exponents) ** 0.5)
        population = replace(population, particles=replace(particles, path=path))
    return fkc_step(problem, config, exponents, population)


def fkc_step(problem: Problem, config: FKC, exponents: Exponents, population: Population) -> Particles:
    """A population one level on: its experts are asked, it is weighed, resampled, and moved.

    A weight depends on where a particle is, not on the noise that moves it: so it comes first, and copies part at once.
    """
    i, before, x = population.step, population.particles, population.particles.path.x
    said, tilt = _evaluated(problem, config, exponents, population)
    mixed = mix(said, exponents, x, problem.levels[i])
    gained = _expert_weight(problem, config, exponents, said, population)
    gained = gained + _tilt_weight(problem, config, exponents, mixed, tilt, population)
    cache = {"x0": mixed.x0, "eps": mixed.eps, "drift": tilt.drift, "rho": tilt.rho, "reward": tilt.reward}
    particles = reweight(replace(before, cache=cache), gained)
    particles = _weighed_out(problem, config, population, particles)
    path = _moved(problem, config, exponents, population, particles)
    cache = {name: particles.cache[name] for name in ("rho", "reward")}
    particles = replace(particles, path=path, cache=cache)
    return _finished(problem, config, population, particles) if i == problem.steps - 1 else particles


def mix(said: Said, exponents: Exponents, x: Tensor, now: Noise) -> Prediction:
    """The prediction of S: eps = sum b_i eps_i and, as x = alpha x0 + sigma eps, x0 = sum b_i x0_i + (1 - B) x / alpha.

    At pure noise (alpha = 0), where that is infinite unless B = 1, it is the experts' mean by their exponents.
    """
    x0, eps = (
        _sum(exponents, {name: p.x0 for name, p in said.items()}),
        _sum(exponents, {n: p.eps for n, p in said.items()}),
    )
    b = total(exponents)
    if now.alpha == 0:
        return Prediction(x0 / b, eps / b)
    return Prediction(x0 if b == 1 else x0 + (1 - b) / now.alpha * x, eps)


def log_weight(said: Said, exponents: Exponents, now: Noise, then: Noise, sampler: str = "ddim") -> Tensor:
    """log w (B,), in float64, that particles gain by their experts over a step:

    c (|sum b_i eps_i|^2 - sum b_i |eps_i|^2)
        = c (B - 1) sum b_i |eps_i|^2 - c (alpha / sigma)^2 sum_{i<j} b_i b_j |x0_i - x0_j|^2.

    For B = 1 and zeta = 1 it is the ratio of densities prod p_i(x'|x)^{b_i} / p_S(x'|x), exactly. The second line
    cancels nothing and is finite at pure noise, where only its second term, over B, remains: there the step draws from
    the product of the experts' kernels.
    """
    b, (c, c0) = total(exponents), SAMPLERS[sampler].weight(now, then)
    gained = torch.zeros(len(next(iter(said.values())).x0), dtype=torch.float64)
    for one, other in combinations(exponents, 2):
        gained -= c0 * exponents[one] * exponents[other] * _square(said[one].x0 - said[other].x0)
    if now.alpha == 0:
        return gained / b
    if b == 1:
        return gained
    return gained + c * (b - 1) * _sum(exponents, {name: _square(p.eps) for name, p in said.items()})


def total(exponents: Exponents) -> float:
    """B, exactly 1 if only rounding is between."""
    b = sum(exponents.values())
    return 1.0 if abs(b - 1) < 1e-9 else b


def costs(problem: Problem, config: FKC, exponents: Exponents) -> tuple[int, int]:
    """The NFEs and reward calls of a particle."""
    again = [i for i in range(problem.steps) if _looks_ahead(problem, config, i)]
    inside = [i for i in again if i + 1 < problem.steps and config.reads == "x0"]
    calls = sum(_reads_reward(problem, config, i) for i in range(problem.steps))
    return len(exponents) * (problem.steps + len(inside)), calls + len(again) + 1


# ------------------------------------------------------------------------------------------------ the tilt


class Tilt(NamedTuple):
    """The tilt where the particles are."""

    reward: Tensor  # (B,), NaN if it was not asked for
    rho: Tensor  # (B,), lambda beta r
    drift: Tensor  # (B, ...), grad rho by x; zero for "free"


def strength(problem: Problem, config: FKC, i: int) -> float:
    """lambda beta at level i, exactly lambda at the last one."""
    if i == problem.steps:
        return config.inverse_temperature
    alpha, sigma = problem.levels[i]
    return config.inverse_temperature * max(0.0, 1 - float(sigma / (alpha * config.ramp)) ** 0.5)


def _reads_reward(problem: Problem, config: FKC, i: int) -> bool:
    """Whether the reward is asked for at level i; the derivative by beta needs it one level before the ramp, too."""
    return strength(problem, config, i) > 0 or (config.tilt == "gradient" and strength(problem, config, i + 1) > 0)


def _looks_ahead(problem: Problem, config: FKC, i: int) -> bool:
    """Whether rho is asked for where the probability flow leads; a step to data only leads there anyway."""
    clean = problem.levels[i + 1].sigma == 0
    return config.tilt == "difference" and not clean and strength(problem, config, i + 1) > 0


def _evaluated(
    problem: Problem, config: FKC, exponents: Exponents, population: Population
) -> tuple[dict[str, Prediction], Tilt]:
    """The experts' predictions at the particles, and the tilt there."""
    i, path, rows = population.step, population.particles.path, population.rows
    now, scale, names = problem.levels[i], strength(problem, config, population.step), tuple(exponents)
    read = partial(_read, config, exponents, now)
    if scale and config.tilt != "free":
        said, reward, gradient = problem.graded_by(path, i, rows, names, read)
        return {name: said[name] for name in names}, Tilt(reward, scale * reward, scale * gradient)
    found = {name: problem.predicted(path, i, rows, name) for name in names}
    reward = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    if _reads_reward(problem, config, i):
        reward = problem.score(read(found, path.x), rows)
    rho = scale * reward if scale else torch.zeros_like(reward)
    return found, Tilt(reward, rho, torch.zeros_like(path.x))


def _read(config: FKC, exponents: Exponents, at: Noise, said: Mapping[str, Prediction], x: Tensor) -> Tensor:
    """The input of the tilt: x / alpha, or the experts' mean estimate sum b_i x0_i / B."""
    if config.reads == "x":
        return x / at.alpha
    return _sum(exponents, {name: said[name].x0 for name in exponents}) / total(exponents)


def _tilt_weight(
    problem: Problem, config: FKC, exponents: Exponents, mixed: Prediction, tilt: Tilt, population: Population
) -> Tensor:
    """log w (B,) by the tilt, that of starting under it included; the step to data pays in `_finished`."""
    i = population.step
    now, then = problem.levels[i], problem.levels[i + 1]
    if config.tilt == "free":
        return tilt.rho - population.particles.cache.get("rho", torch.zeros_like(tilt.rho))
    start = tilt.rho if i == 0 else torch.zeros_like(tilt.rho)
    if then.sigma == 0 or not strength(problem, config, i + 1):
        return start
    if config.tilt == "difference":
        return start + _rho_ahead(problem, config, exponents, renoise(mixed, then), population) - tilt.rho
    by_level = (strength(problem, config, i + 1) - strength(problem, config, i)) * tilt.reward
    slope = (tilt.drift.double() * mixed.eps.double()).flatten(1).sum(1).cpu()
    return start + by_level - now.sigma * (1 - shrinkage(now, then)) * slope


def _rho_ahead(problem: Problem, config: FKC, exponents: Exponents, x: Tensor, population: Population) -> Tensor:
    """rho (B,) at the next level."""
    i, rows = population.step + 1, population.rows
    said: dict[str, Prediction] = {}
    if i < problem.steps and config.reads == "x0":
        said = {name: problem.predicted(Path(x), i, rows, name) for name in exponents}
    at = problem.levels[i]
    clean = x / at.alpha if i == problem.steps else _read(config, exponents, at, said, x)
    return strength(problem, config, i) * problem.score(clean, rows)


def _finished(problem: Problem, config: FKC, population: Population, particles: Particles) -> Particles:
    """The particles at the last level, with their rewards and with what the tilt still owes."""
    reward = problem.score(particles.path.x / problem.levels[-1].alpha, population.rows)
    after = replace(particles, cache={"reward": reward})
    if config.tilt == "free" or problem.levels[-1].sigma == 0:
        return reweight(after, config.inverse_temperature * reward - particles.cache["rho"])
    return after


# ------------------------------------------------------------------------------------------------ parts of a step


def _active(problem: Problem, config: FKC, i: int) -> bool:
    """Whether the experts give weight at step i; a step to data has no density to weigh."""
    inside = config.start * problem.steps <= i < config.stop * problem.steps
    return inside and bool(problem.levels[i + 1].sigma > 0)


def _expert_weight(problem: Problem, config: FKC, exponents: Exponents, said: Said, population: Population) -> Tensor:
    """log w (B,) by the experts, centred and clamped in each group as the settings say."""
    i, particles = population.step, population.particles
    if not _active(problem, config, i):
        return torch.zeros(len(population.rows), dtype=torch.float64)
    gained = log_weight(said, exponents, problem.levels[i], problem.levels[i + 1], config.sampler)
    gained = gained.view(particles.groups, particles.size)
    if config.centred:
        gained = gained - gained.mean(1, keepdim=True)
    if config.clamp is not None:
        gained = gained.clamp(-config.clamp, config.clamp)
    return gained.flatten()


def _weighed_out(problem: Problem, config: FKC, population: Population, particles: Particles) -> Particles:
    """Resampled if the step gave weight, and if noise follows that tells copies apart."""
    i = population.step
    weighed = _active(problem, config, i) or _reads_reward(problem, config, i)
    if not weighed or problem.levels[i + 1].sigma == 0:
        return particles
    return resampled(problem, config, population, particles)


def _moved(problem: Problem, config: FKC, exponents: Exponents, population: Population, particles: Particles) -> Path:
    """The step along S and half of its variance along the tilt's gradient."""
    i, cache = population.step, particles.cache
    now, then = problem.levels[i], problem.levels[i + 1]
    mixed = Prediction(cache["x0"], cache["eps"])
    mean, std = SAMPLERS[config.sampler].move(mixed, now, then, noise_of(problem, config))
    if now.alpha == 0:
        std = std / total(exponents) ** 0.5  # a product of kernels
    mean = mean + std**2 / 2 * now.alpha / then.alpha * cache["drift"]
    pairs = zip(population.groups.tolist(), population.offsets.tolist(), strict=True)
    noise = torch.cat([problem.noise(g, o, STEP, i, n=particles.size) for g, o in pairs])
    return end(particles.path, mean + std * noise, then, mixed)


def _sum(exponents: Exponents, values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([b * values[name] for name, b in exponents.items()]).sum(0)


def _square(x: Tensor) -> Tensor:
    """|x|^2 (B,), in float64 on the CPU."""
    return (x.double() ** 2).flatten(1).sum(1).cpu()


# ------------------------------------------------------------------------------------------------ at the door


def mixture(problem: Problem, config: FKC) -> tuple[Problem, dict[str, float]]:
    """The problem with an expert for each of its conditions, and the exponents of those that take part.

    Raises ValueError for guidance inside that is not exponents, for an unknown expert, and for B <= 0.
    """
    own, experts = _read_off(problem)
    experts = {**experts, **problem.experts}
    exponents = {name: float(b) for name, b in (config.exponents or own).items() if b}
    for name in exponents:
        if name not in experts:
            raise UserError(f"no expert {name!r}; known: {', '.join(experts)}")
        _check_unguided(name, experts[name](problem.groups))
    if not 0 < total(exponents) < float("inf"):  # nor NaN
        raise UserError(
            f"the exponents {exponents} sum to {total(exponents):g}: only a finite sum above 0 has a law to sample"
        )
    spent, problem = problem.spent, replace(problem, experts=experts)
    problem.spent = spent  # one account, also for the caller
    return problem, exponents


def _read_off(problem: Problem) -> tuple[dict[str, float], dict[str, PredictOf]]:
    """The exponents that the problem's own prediction stands for, and an expert for each of its conditions."""
    predict = problem.predict(problem.groups)
    if not isinstance(predict, GuidedPredict):
        return {"cond": 1.0}, {"cond": problem.predict}
    experts: dict[str, PredictOf] = {name: partial(_condition, problem.predict, name) for name in predict.conds}
    guidance = predict.guidance
    if isinstance(guidance, Plain):
        return {"cond": 1.0}, experts
    if not isinstance(guidance, CFG):
        raise UserError(
            f"fkc weighs experts with exponents, and {type(guidance).__name__} is none: take cfg, or no guidance"
        )
    if not isinstance(guidance.scale, int | float):
        raise UserError("fkc needs CFG of one number: a scale that changes with the noise level has no exponents")
    return geometric(guidance.scale), experts


def _condition(predict: PredictOf, name: str, groups: Tensor) -> Predict:
    """The unguided prediction of one condition."""
    whole = predict(groups)
    assert isinstance(whole, GuidedPredict)
    return replace(whole, guidance=Plain(), conds={"cond": whole.conds[name]}, counter=RowCounter())


def _check_unguided(name: str, predict: Predict) -> None:
    if isinstance(predict, GuidedPredict) and not isinstance(predict.guidance, Plain):
        method = type(predict.guidance).__name__
        raise UserError(f"the expert {name!r} of fkc is guided by {method}: experts are unguided, take Plain()")


def noise_of(problem: Problem, config: FKC) -> float:
    """zeta, the problem's eta unless it is set."""
    return problem.eta if config.zeta is None else config.zeta


def check_noise(problem: Problem, config: FKC, exponents: Exponents) -> None:
    """Raises ValueError for a zeta that the sampler cannot have, and for an unstable annealing; warns at its boundary.

    The relative error of the variance of q^beta grows at the rate beta (1 - zeta^2) - 1 for each e-fold of k, and
    weights outgrow it only if zeta^2 > (beta - 1) / beta.
    """
    zeta = noise_of(problem, config)
    if config.zeta is None:
        problem.needs_noise("fkc")
    if not 0 < zeta <= (1 if config.sampler == "ddim" else torch.inf):
        raise UserError(
            f"zeta is {zeta}: {config.sampler} takes {'0 < zeta <= 1' if config.sampler == 'ddim' else 'zeta > 0'}; "
            "without noise, all copies of a particle stay the same"
        )
    beta = total(exponents)
    least = (beta - 1) / beta
    if len(exponents) > 1 or beta <= 1 or zeta**2 > least + BOUNDARY:
        return
    says = f"zeta = {zeta:g} for annealing with beta = {beta:g}: zeta^2 must be above (beta - 1) / beta = {least:.4g}"
    if zeta**2 < least - BOUNDARY:
        raise UserError(f"{says}, or the particles' variance grows faster than weights repair; take zeta = 1")
    warnings.warn(f"{says}; at the boundary, errors of the start do not die out", Caution, 3)
