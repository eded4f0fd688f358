"""Sequential Monte Carlo: particles with log-weights, their resampling, and an unbiased estimate of Z.

A population is G groups (one for each prompt) of K particles. Groups never mix: each has its weights, its resampling
and its generator, so that its result does not depend on the groups that run beside it. One step of a method is

    particles = reweight(replace(particles, path=path), increments)
    particles = resample(particles, generators, "systematic", 0.5)

and `log_z(particles)` at any time is the logarithm of an unbiased estimate of Z = E[product of the weights].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import torch
from numpy.random import SeedSequence
from torch import Tensor

from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.samplers.catalogue import unit_normal

Generators = Sequence[torch.Generator | None]  # one for each group
Resampler = Callable[[Tensor, torch.Generator | None], Tensor]  # weights (K,) that sum to one -> indices (K,)


@dataclass(frozen=True)
class Particles:
    """G groups of K particles, and all that must follow a particle when it is copied.

    Row g * K + k of `path` and of every tensor in `cache` (a last reward, a running maximum, a network's answer)
    belongs to particle k of group g: `resample` moves them all.
    """

    path: Path  # (G * K, ...)
    log_weights: Tensor  # (G, K) float64, on the CPU: since the group's last resampling
    log_mass: Tensor  # (G,) float64: log of the product of the mean weights at all resamplings so far
    parents: Tensor  # (G, K): where in its group each particle came from in the last call of `resample`
    roots: Tensor  # (G, K): where in its group its ancestor was at the start
    cache: Mapping[str, Tensor] = field(default_factory=dict)  # (G * K, ...)

    @property
    def groups(self) -> int:
        return self.log_weights.shape[0]

    @property
    def size(self) -> int:
        """K, the particles of a group."""
        return self.log_weights.shape[1]


def populate(path: Path, groups: int = 1, cache: Mapping[str, Tensor] | None = None) -> Particles:
    """The rows of a path as `groups` groups of particles of equal weight, group after group.

    Raises ValueError unless `groups` divides the rows and every tensor of the cache has as many of them.
    """
    rows, cache = len(path.x), dict(cache or {})
    if groups < 1 or rows % groups:
        raise UserError(f"{rows} rows do not make {groups} groups of equal size: pass groups * K rows")
    for name, value in cache.items():
        if not value.ndim or len(value) != rows:
            raise UserError(f"cache[{name!r}] has the shape {tuple(value.shape)}: its first dimension must be {rows}")
    zeros = torch.zeros(groups, rows // groups, dtype=torch.float64)
    places = torch.arange(rows // groups).expand(groups, -1).clone()
    return Particles(path, zeros, zeros[:, 0].clone(), places, places, cache)


def reweight(particles: Particles, increments: Tensor) -> Particles:
    """Particles whose log-weights grew by `increments`, (G * K,) or (G, K).

    Raises ValueError if an increment is NaN or +inf, or if a whole group has weight zero.
    """
    increments = increments.detach().to("cpu", torch.float64).view_as(particles.log_weights)
    if bool((increments.isnan() | (increments == torch.inf)).any()):
        raise UserError("a log-weight is NaN or infinite: lower the reward's scale, or look for NaN in its scores")
    log_weights = particles.log_weights + increments
    dead = (log_weights == -torch.inf).all(1).nonzero()[:, 0].tolist()
    if dead:
        raise UserError(f"all {particles.size} particles of group {dead[0]} have weight zero: use more of them")
    return replace(particles, log_weights=log_weights)


def weights(particles: Particles) -> Tensor:
    """W (G, K): the weights of each group, which sum to one."""
    return particles.log_weights.softmax(1)


def ess(particles: Particles) -> Tensor:
    """Effective sample size (G,) of each group: 1 / sum W^2, between 1 and K."""
    return 1 / (weights(particles) ** 2).sum(1)


def log_z(particles: Particles) -> Tensor:
    """log Z (G,) of each group: the mean weights at all resamplings, and of the weights since, multiplied.

    exp(log_z) is unbiased for any K and any threshold (Del Moral 2004, theorem 7.4.2); its logarithm is biased low.
    """
    return particles.log_mass + _log_mean(particles.log_weights)


def resample(
    particles: Particles, generators: Generators, method: str = "systematic", threshold: float | None = 0.5
) -> Particles:
    """Each group whose effective sample size is below threshold * K is resampled, and its weights become equal.

    A group that is not keeps its weights. threshold: in [0, 1]; 0 never resamples, None always does.
    Raises ValueError for an unknown method, a threshold outside of [0, 1], and unless there is a generator a group.
    """
    check_resampling(method, threshold)
    check_generators(generators, particles.groups)
    due = torch.ones(particles.groups, dtype=torch.bool)
    if threshold is not None:
        due = ess(particles) < threshold * particles.size
    places = torch.arange(particles.size)
    draw, shares = RESAMPLERS[method], weights(particles)
    parents = [draw(w, g) if d else places for w, g, d in zip(shares, generators, due.tolist(), strict=True)]
    return _moved(particles, torch.stack(parents), due)


def draw(particles: Particles, generators: Generators) -> Tensor:
    """One row of the path (G,) for each group, drawn by the weights: a sample of the target, unlike the best one."""
    check_generators(generators, particles.groups)
    pairs = zip(weights(particles), generators, strict=True)
    places = torch.stack([_located(w, _uniform(1, g))[0] for w, g in pairs])
    return places + torch.arange(particles.groups) * particles.size


def ancestry(parents: Sequence[Tensor]) -> Tensor:
    """The places of the last particles' ancestors: (S + 1, G, K) from the `parents` of S states, the start first."""
    lines = [torch.arange(parents[-1].shape[1]).expand_as(parents[-1])]
    for step in reversed(parents):
        lines.append(step.gather(1, lines[-1]))
    return torch.stack(lines[::-1])


def noise_like(x: Tensor, generators: Generators) -> Tensor:
    """Noise (G * K, ...) like x, each group's from its own generator."""
    shape = (len(x) // len(generators), *x.shape[1:])
    return torch.cat([unit_normal(shape, g, x.device, x.dtype) for g in generators])


def generators_of(seed: int, groups: Sequence[int]) -> list[torch.Generator]:
    """A generator on the CPU for each of the groups of these numbers: `range(G)` for all G of a run.

    Group g has the same one whichever others run. Seed and number are mixed (numpy's SeedSequence), so that
    neighbouring seeds have no generator in common.
    """
    states = [int(SeedSequence([seed, g]).generate_state(1, "uint64")[0]) for g in groups]
    return [torch.Generator().manual_seed(state) for state in states]


def systematic(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One uniform u, at the positions (u + k) / K: particle k has floor(K W_k) or ceil(K W_k) offspring.

    Equal weights leave all in their places (Carpenter, Clifford and Fearnhead 1999).
    """
    return _located(weights, (_uniform(1, generator) + torch.arange(len(weights))) / len(weights))


def stratified(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A uniform u_k for each position (u_k + k) / K; equal weights leave all in their places (Kitagawa 1996)."""
    return _located(weights, (_uniform(len(weights), generator) + torch.arange(len(weights))) / len(weights))


def residual(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """floor(K W_k) copies of each, and independent draws by what remains (Liu and Chen 1998)."""
    expected = len(weights) * weights
    counts = (expected + 1e-9).floor()  # K * (1 / K) is below 1 for some K
    copies = torch.arange(len(weights)).repeat_interleave(counts.long())
    missing = len(weights) - len(copies)
    if not missing:
        return copies
    rest = (expected - counts).clamp(min=0)
    return torch.cat([copies, _located(rest / rest.sum(), _uniform(missing, generator))])


def multinomial(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """K independent draws: the noisiest, and the only one that moves particles of equal weight."""
    return _located(weights, _uniform(len(weights), generator))


RESAMPLERS: dict[str, Resampler] = {f.__name__: f for f in (systematic, stratified, residual, multinomial)}


def check_resampling(method: str, threshold: float | None) -> None:
    """Raises ValueError for an unknown method, and for a threshold outside of [0, 1]."""
    if method not in RESAMPLERS:
        raise UserError(f"no resampling {method!r}; known: {', '.join(RESAMPLERS)}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"a threshold of {threshold} of K: give one in [0, 1], or None to resample always")


def check_generators(generators: Any, groups: int) -> None:
    """Raises ValueError unless there is one generator (or None, the global one) for each group."""
    if not isinstance(generators, Sequence) or len(generators) != groups:
        given = len(generators) if isinstance(generators, Sequence) else "one"
        raise UserError(f"{given} generators for {groups} groups of particles: pass a list with one for each group")


def _moved(particles: Particles, parents: Tensor, due: Tensor) -> Particles:
    """Every particle from where its parent was; the groups that were due start anew with equal weights."""
    rows = (parents + particles.size * torch.arange(particles.groups)[:, None]).flatten()
    mass = torch.where(due, _log_mean(particles.log_weights), 0.0)
    moved = replace(
        particles,
        log_weights=particles.log_weights.masked_fill(due[:, None], 0.0),
        log_mass=particles.log_mass + mass,
        parents=parents,
        roots=particles.roots.gather(1, parents),
    )
    if bool((parents == torch.arange(particles.size)).all()):
        return moved
    cache = {name: value[rows.to(value.device)] for name, value in particles.cache.items()}
    return replace(moved, path=particles.path[rows.to(particles.path.x.device)], cache=cache)


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(1) - log(log_weights.shape[1])


def _uniform(n: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.rand(n, generator=generator, dtype=torch.float64, device=device).cpu()


def _located(weights: Tensor, positions: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds each position; never one of weight zero."""
    last = int(weights.nonzero()[-1])  # the sum may fall short of one, and of the last position
    return torch.searchsorted(weights.cumsum(0), positions, right=True).clamp(max=last)
