"""Resampling against its definition, and Z against the exact sums of a finite chain."""

from dataclasses import replace
from math import log

import pytest
import torch

from guidance.search import smc
from guidance.search.smc import RESAMPLERS, draw, ess, generators_of, log_z, populate, resample, reweight, weights
from solvers.denoiser import Path


def shares(k: int = 7, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.5 * logits).softmax(0)


def counts(method: str, w: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    return RESAMPLERS[method](w, generator).bincount(minlength=len(w))


@pytest.mark.parametrize("method", RESAMPLERS)
def test_offspring_are_unbiased(method):
    """The mean number of offspring is K W_k."""
    w, generator = shares(), torch.Generator().manual_seed(1)
    drawn = torch.stack([counts(method, w, generator) for _ in range(2000)]).double()
    assert drawn.sum(1).eq(7).all()
    error = drawn.std(0) / 2000**0.5
    assert ((drawn.mean(0) - 7 * w).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("seed", range(20))
def test_systematic_offspring_are_floor_or_ceil(seed):
    w = shares(seed=seed)
    got = counts("systematic", w, torch.Generator().manual_seed(seed))
    assert ((got == (7 * w).floor()) | (got == (7 * w).ceil())).all()


@pytest.mark.parametrize("method", ["systematic", "stratified", "residual"])
@pytest.mark.parametrize("k", [1, 2, 7, 49, 103, 4096])
def test_equal_weights_move_nothing(method, k):
    """Residual would, at K = 49: 49 * (1 / 49) is below 1."""
    w = torch.zeros(k, dtype=torch.float64).softmax(0)
    assert RESAMPLERS[method](w, torch.Generator().manual_seed(k)).equal(torch.arange(k))


def test_variance_is_below_that_of_independent_draws():
    """A theorem for residual and stratified (Douc, Cappe and Moulines 2005), and K W (1 - W) for multinomial."""
    w, generator = shares(), torch.Generator().manual_seed(2)
    spread = {m: torch.stack([counts(m, w, generator) for _ in range(1000)]).double().var(0) for m in RESAMPLERS}
    torch.testing.assert_close(spread["multinomial"].sum(), (7 * w * (1 - w)).sum(), rtol=0.1, atol=0)
    assert all(spread[m].sum() < spread["multinomial"].sum() for m in ("residual", "stratified"))


@pytest.mark.parametrize("method", RESAMPLERS)
@pytest.mark.parametrize("dead", [0, -1])
def test_weight_zero_has_no_offspring(method, dead):
    log_weights = torch.zeros(7, dtype=torch.float64)
    log_weights[dead] = -torch.inf
    for seed in range(50):
        assert counts(method, log_weights.softmax(0), torch.Generator().manual_seed(seed))[dead] == 0


def labelled(groups: int, k: int):
    """Particles whose every tensor is labelled with the row that it started in."""
    rows = torch.arange(groups * k, dtype=torch.float64)
    path = Path(rows[:, None, None].expand(-1, 2, 2).clone(), rows[:, None].clone(), {"a": rows, "b": rows[:, None]})
    return populate(path, groups, {"reward": rows.clone(), "twist": rows[:, None].clone()})


def rows_of(particles) -> list[torch.Tensor]:
    path = particles.path
    every = (path.x, path.x0, *path.memory.values(), *particles.cache.values())
    return [value.flatten(1)[:, 0] if value.ndim > 1 else value for value in every]


@pytest.mark.parametrize("method", RESAMPLERS)
def test_everything_moves_and_groups_never_mix(method):
    start = reweight(labelled(3, 8), 2 * torch.randn(24, dtype=torch.float64))
    after = resample(start, generators_of(0, range(3)), method, None)
    rows = (after.parents + 8 * torch.arange(3)[:, None]).flatten().double()
    assert len(rows_of(after)) == 6 and all(value.equal(rows) for value in rows_of(after))
    assert not after.parents.equal(start.parents)
    assert all((value.view(3, 8) // 8 == torch.arange(3)[:, None]).all() for value in rows_of(after))


def test_roots_and_ancestry_agree():
    generators, particles, parents = generators_of(3, range(2)), labelled(2, 16), []
    for _ in range(5):
        particles = resample(reweight(particles, torch.randn(2, 16)), generators, threshold=0.7)
        parents.append(particles.parents)
    lines = smc.ancestry(parents)
    assert lines.shape == (6, 2, 16) and lines[0].equal(particles.roots)
    assert (lines[0] + 16 * torch.arange(2)[:, None]).flatten().double().equal(particles.path.x[:, 0, 0])


def test_threshold_is_of_each_group():
    """ESS is K for equal weights and 1 / sum W^2 else; a group above the threshold keeps its weights and its rows."""
    increments = torch.tensor([[0.0, 0, 0, 0], [0.0, 0, 0, 50]], dtype=torch.float64)
    start = reweight(labelled(2, 4), increments)
    torch.testing.assert_close(ess(start), torch.tensor([4.0, 1.0], dtype=torch.float64))
    after = resample(start, generators_of(0, range(2)), threshold=0.5)
    assert after.parents.tolist() == [[0, 1, 2, 3], [3, 3, 3, 3]]
    kept = resample(start, generators_of(0, range(2)), threshold=0.0)
    assert kept.log_weights.equal(start.log_weights) and kept.path is start.path
    torch.testing.assert_close(log_z(kept), log_z(start))
    torch.testing.assert_close(log_z(after), log_z(start))


@pytest.mark.parametrize("method", RESAMPLERS)
def test_a_group_alone_is_the_same_group(method):
    """Its noise, its resampling and its draw do not depend on the groups beside it."""

    def run(groups: list[int]):
        generators = generators_of(5, groups)
        particles = populate(Path(smc.noise_like(torch.zeros(len(groups) * 6, 2), generators)), len(groups))
        for _ in range(4):
            particles = resample(reweight(particles, particles.path.x[:, 0]), generators, method, 0.6)
            x = particles.path.x + smc.noise_like(particles.path.x, generators)
            particles = replace(particles, path=replace(particles.path, x=x))
        return particles, draw(particles, generators)

    (together, drawn), (alone, own) = run([0, 1, 2]), run([1])
    assert alone.path.x.equal(together.path.x[6:12])
    assert alone.log_weights.equal(together.log_weights[1:2]) and log_z(alone).equal(log_z(together)[1:2])
    assert own[0] == drawn[1] - 6 and 6 <= drawn[1] < 12


def test_draw_is_by_weight():
    start = reweight(labelled(1, 4), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(start, [generator])[0] for _ in range(4000)]).bincount(minlength=4) / 4000
    assert (drawn - weights(start)[0]).abs().max() < 4 * 0.5 / 4000**0.5


STATES, STEPS, LAMBDA = 12, 5, 2.0


class Chain:
    """A finite chain, a reward of its last state and what it is expected to be at each step before.

    exp(lambda (r_t - r_{t-1})) are the weights.
    """

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        gamma = torch.distributions.Dirichlet(torch.full((STATES,), 0.5, dtype=torch.float64))
        self.first = gamma.sample()
        self.moves = [gamma.sample((STATES,)) for _ in range(STEPS)]
        self.rewards = [torch.randn(STATES, dtype=torch.float64)]
        for move in self.moves[::-1]:
            self.rewards.insert(0, move @ self.rewards[0])

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Z, and the tilted law (states,) of the last state."""
        law = self.first
        for move in self.moves:
            law = law @ move
        tilted = law * (LAMBDA * self.rewards[-1]).exp()
        return tilted.sum(), tilted / tilted.sum()

    def run(self, groups: int, k: int, method: str, threshold: float | None):
        x = self.first.multinomial(groups * k, replacement=True)
        none = [None] * groups
        particles = reweight(populate(Path(x), groups), LAMBDA * self.rewards[0][x])
        for move, before, after in zip(self.moves, self.rewards, self.rewards[1:], strict=False):
            particles = resample(particles, none, method, threshold)
            old = particles.path.x
            new = move[old].multinomial(1)[:, 0]
            particles = replace(particles, path=Path(new))
            particles = reweight(particles, LAMBDA * (after[new] - before[old]))
        return particles


def ratio(particles, z: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error of Z-hat / Z over the groups."""
    ratios = (log_z(particles) - z.log()).exp()
    return float(ratios.mean()), float(ratios.std() / len(ratios) ** 0.5)


@pytest.mark.parametrize("method", RESAMPLERS)
@pytest.mark.parametrize("threshold", [0.5, None])
def test_z_is_unbiased_at_four_particles(method, threshold):
    """E[Z-hat] = Z, while E[log Z-hat] is below log Z."""
    chain = Chain()
    particles = chain.run(2000, 4, method, threshold)
    mean, error = ratio(particles, chain.exact()[0])
    assert abs(mean - 1) < 4 * error and error < 0.03
    assert (log_z(particles) - chain.exact()[0].log()).mean() < -0.05


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, None])
def test_z_is_unbiased_in_20000_runs(threshold):
    chain = Chain()
    mean, error = ratio(chain.run(20_000, 4, "systematic", threshold), chain.exact()[0])
    assert abs(mean - 1) < 4 * error and error < 0.008


def test_tilted_law():
    """Many particles of one group have the exact law of the last state: in total variation, to 0.02."""
    chain = Chain()
    for threshold in (0.5, None):
        particles = chain.run(1, 20_000, "systematic", threshold)
        law = torch.zeros(STATES, dtype=torch.float64).index_add(0, particles.path.x, weights(particles)[0])
        assert (law - chain.exact()[1]).abs().sum() / 2 < 0.02


def test_dropped_weights_are_caught(monkeypatch):
    """The published bug: a group that is not resampled loses its weights. The oracle sees it."""
    kept = resample

    def dropped(particles, *args):
        after = kept(particles, *args)
        return replace(after, log_weights=torch.zeros_like(after.log_weights))

    monkeypatch.setitem(globals(), "resample", dropped)
    chain = Chain()
    particles = chain.run(1, 20_000, "systematic", 0.5)
    law = torch.zeros(STATES, dtype=torch.float64).index_add(0, particles.path.x, weights(particles)[0])
    assert (law - chain.exact()[1]).abs().sum() / 2 > 0.04


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: resample(p, [None], "best"), "no resampling 'best'; known: systematic"),
        (lambda p: resample(p, [None], threshold=2.0), "threshold of 2.0 of K"),
        (lambda p: resample(p, [None, None]), "2 generators for 1 groups"),
        (lambda p: resample(p, None), "one generators for 1 groups"),
        (lambda p: reweight(p, torch.tensor([0.0, torch.nan])), "log-weight is NaN or infinite"),
        (lambda p: reweight(p, torch.tensor([0.0, torch.inf])), "log-weight is NaN or infinite"),
        (lambda p: reweight(p, torch.full((2,), -torch.inf)), "all 2 particles of group 0 have weight zero"),
        (lambda p: populate(p.path, 3), "2 rows do not make 3 groups"),
        (lambda p: populate(p.path, 1, {"reward": torch.zeros(3)}), r"cache\['reward'\] has the shape \(3,\)"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call(populate(Path(torch.zeros(2, 3))))


def test_large_log_weights_do_not_overflow():
    """lambda r = 5000, with which the published code's exp saturates."""
    particles = reweight(populate(Path(torch.zeros(2, 1))), torch.tensor([5000.0, 5001.0]))
    torch.testing.assert_close(weights(particles)[0, 1].item(), 1 / (1 + torch.e**-1))
    torch.testing.assert_close(log_z(particles).item(), 5001 + log((1 + torch.e**-1) / 2))
