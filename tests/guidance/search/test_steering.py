"""Particle methods against exact laws: finite chains, linear Gaussian chains, identities, and counted calls.

`SEARCHES` is tested as a family: whatever is registered there must resume exactly, stay within its budget, get no worse
and depend on its seeds alone.
"""

import inspect
import json
from dataclasses import replace
from functools import partial
from math import log, sqrt

import pytest
import torch
from safetensors.torch import load, save

from guidance.search import baselines, fk, population, selection, tds
from guidance.search.baselines import BestOfN, Importance, best_of_n_kl
from guidance.search.catalogue import SEARCHES
from guidance.search.dts import DTS, DTSStar, DTSStarPaper
from guidance.search.fk import FK, scheduled
from guidance.search.problem import Problem, Saved, Spent
from guidance.search.selection import SVDD
from guidance.search.tds import TDS, tempered
from solvers.denoiser import Path
from solvers.exact import Gaussian, bind
from solvers.noise import cosine, flow, grid
from tests.support.chains import F64, STATES, Linear, chain, chain_target, histogram, log_z, moments

SHORT = Linear(steps=4, low=0.5)
SETTINGS = {  # where a method's defaults do not suit a problem of four steps and one dimension
    "fk": FK(start=0.0, every=0.25, inverse_temperature=2.0),
    "tds": TDS(inverse_temperature=2.0),
    "svdd": SVDD(particles=2, candidates=3, inverse_temperature=2.0),
    "importance": Importance(particles=3, inverse_temperature=2.0),
    "best-of-n": BestOfN(particles=3),
    "dts": DTS(branches=4, inverse_temperature=2.0, widening=1.0, growth=0.5),
    "dts-star": DTSStar(branches=4),
    "dts-star-paper": DTSStarPaper(branches=4, widening=1.0, growth=0.5),
}
DETERMINISTIC = {"best-of-n", "importance"}  # take eta = 0


def searched(name, seeds=(3, 9), config=None, saved=None, **options):
    """All states of a search on the short problem."""
    problem = SHORT.problem(seeds, **{"nfe_budget": 60, **options})
    config = config or SETTINGS.get(name) or SEARCHES[name].config()
    return list(SEARCHES[name].search(problem, config, saved))


def same_end(a, b, rows=slice(None)):
    """The last state b is rows of the last state a."""
    for field in ("x0", "reward", *Spent._fields):
        torch.testing.assert_close(vars(a)[field][rows], vars(b)[field], rtol=1e-10, atol=1e-10)


@pytest.fixture(params=SEARCHES)
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------ the family


def test_the_best_never_gets_worse_and_the_budget_holds(name):
    states = searched(name)
    for before, after in zip(states, states[1:], strict=False):
        assert (after.reward >= before.reward).all()
        assert (after.nfe >= before.nfe).all()
    assert (states[-1].nfe <= 60).all()
    assert (states[-1].nfe > 30).all()  # and is used
    assert states[-1].reward.isfinite().all()


@pytest.mark.filterwarnings("ignore:the budget pays for")
@pytest.mark.parametrize("levels", [partial(grid, flow), partial(grid, cosine, start=0.98)], ids=["flow", "vp"])
@pytest.mark.sampled(2)
def test_every_search_at_any_number_of_steps(name, levels):
    """With the default settings, from 1 step to 250: it ends, at what the budget pays for, and with a sample."""
    exact = Gaussian(torch.tensor([0.5], **F64), 1.0)
    for steps in (1, 2, 3, 100, 250):
        problem = Problem(levels(steps), lambda groups: bind(exact, {}), lambda x0, groups: x0[:, 0], (1,),
                          nfe_budget=6 * steps, costs=(1,) * steps, **F64)  # fmt: skip
        *_, last = SEARCHES[name].search(problem, SEARCHES[name].config())
        assert 4 * steps <= int(last.nfe) <= 6 * steps and bool(last.x0.isfinite().all())
        assert last.reward.item() == pytest.approx(last.x0.item(), abs=1e-9)


def test_the_best_is_the_best_of_the_finished_samples(name):
    state = searched(name)[-1]
    weighted = state.weighted()
    for group in range(2):
        mine = weighted.groups == group
        assert state.reward[group] == weighted.reward[mine].max()
    torch.testing.assert_close(state.reward, SHORT.slope * state.x0[:, 0].double())


def test_neither_neighbours_nor_micro_batches_change_a_group(name):
    both = searched(name)[-1]
    same_end(both, searched(name, seeds=(9,))[-1], slice(1, 2))
    same_end(both, searched(name, micro_batch=3)[-1])


def test_the_seed_decides(name):
    """Exactly: the same seeds give the same numbers and the same weights."""
    one, other = searched(name)[-1], searched(name)[-1]
    assert all(vars(one)[field].equal(vars(other)[field]) for field in ("x0", "reward", *Spent._fields))
    assert all(a.equal(b) for a, b in zip(one.weighted(), other.weighted(), strict=True))
    assert not torch.equal(searched(name, seeds=(4, 9))[-1].x0[0], searched(name)[-1].x0[0])


def test_resumed_anywhere_the_end_is_the_same(name):
    problem = SHORT.problem((3, 9), nfe_budget=60)
    states = SEARCHES[name].search(problem, SETTINGS.get(name) or SEARCHES[name].config())
    kept = [(state, state.saved()) for state in states]
    for _, (tensors, info) in (*kept[:: max(1, len(kept) // 7)], kept[-1]):
        tensors = load(save(dict(tensors)))
        rest = searched(name, saved=Saved(tensors, json.loads(json.dumps(info))))
        same_end(kept[-1][0], rest[-1])
        torch.testing.assert_close(kept[-1][0].weighted().log_weight, rest[-1].weighted().log_weight)


def test_with_a_larger_budget_it_goes_on_to_what_that_budget_gives(name):
    config = SETTINGS.get(name) or SEARCHES[name].config()
    config = config if name.startswith("dts") else replace(config, particles=2)
    kept = searched(name, config=config, nfe_budget=40)[-1].saved()
    same_end(
        searched(name, config=config, nfe_budget=90)[-1], searched(name, config=config, saved=kept, nfe_budget=90)[-1]
    )


@pytest.mark.parametrize("name", ["fkc", "fk", "tds", "beam"])
def test_a_population_as_large_as_its_budget_cannot_grow(name):
    config = replace(SETTINGS.get(name) or SEARCHES[name].config(), particles=None)
    kept = searched(name, config=config, nfe_budget=40)[-1].saved()
    with pytest.raises(
        ValueError, match=f"the saved {name} has runs of .* particles, and this one of .*: a population"
    ):
        searched(name, config=config, saved=kept, nfe_budget=90)


def test_parents_come_before_children_and_stay_in_their_group(name):
    graph = searched(name)[-1].graph()
    children = (graph.parent >= 0).nonzero()[:, 0]
    assert len(children) > 0
    parents = graph.parent[children]
    assert (parents < children).all()
    assert (graph.level[parents] < graph.level[children]).all()
    assert (graph.groups[parents] == graph.groups[children]).all()


def test_a_deterministic_sampler_is_refused_or_served(name):
    if name in DETERMINISTIC:
        assert searched(name, eta=0.0)[-1].reward.isfinite().all()
    else:
        with pytest.raises(ValueError, match="needs a stochastic sampler: with eta = 0"):
            searched(name, eta=0.0)


def test_a_budget_too_small_is_refused(name):
    with pytest.raises(ValueError, match="budget"):
        searched(name, nfe_budget=3)


# ------------------------------------------------------------------------------------------------ exact laws


EACH = dict(start=0.0, stop=1.0, every=0.2, inverse_temperature=1.0)  # a potential at every step of the chain
MILD = {"difference": 1.0, "max": 1.0, "sum": 0.25}  # lambda: a product of five sums of rewards is wild


def distance(x0, log_weight, inverse_temperature=1.0) -> float:
    """Total variation to the chain's target."""
    target = chain_target(inverse_temperature)[0]
    return float((histogram(x0, log_weight) - target).abs().sum() / 2)


CHANCE, CAUGHT = 0.04, 0.06  # what 6000 particles may differ by, and what every broken version exceeds


def steered(k=6000, **settings):
    *_, state = fk.fk(chain(), FK(particles=k, **{**EACH, **settings}))
    return state.weighted()


@pytest.mark.parametrize("threshold", [0.9, None])
@pytest.mark.parametrize("potential", fk.POTENTIALS)
@pytest.mark.sampled(2)
def test_fk_samples_the_tilted_chain(potential, threshold):
    weighted = steered(potential=potential, threshold=threshold, inverse_temperature=MILD[potential])
    assert distance(weighted.x0, weighted.log_weight, MILD[potential]) < CHANCE


def unbiased(search, config, problem, groups, log_target, most):
    """Ratios of estimates to Z have mean one within four standard errors, which are at most `most`."""
    *_, state = search(problem, config)
    ratios = (log_z(state.weighted(), groups) - log_target).exp()
    error = float(ratios.std()) / sqrt(groups)
    assert error < most
    assert abs(float(ratios.mean()) - 1) < 4 * error


@pytest.mark.parametrize("threshold", [0.9, None])
@pytest.mark.parametrize("potential", fk.POTENTIALS)
def test_the_estimate_of_z_is_unbiased_at_four_particles(potential, threshold):
    settings = {**EACH, "inverse_temperature": MILD[potential]}
    config = FK(particles=4, potential=potential, threshold=threshold, **settings)
    unbiased(fk.fk, config, chain(1500), 1500, log(chain_target(MILD[potential])[1]), 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.9, None])
@pytest.mark.parametrize("potential", fk.POTENTIALS)
def test_the_estimate_of_z_is_unbiased_over_20000_runs(potential, threshold):
    settings = {**EACH, "inverse_temperature": MILD[potential]}
    config = FK(particles=4, potential=potential, threshold=threshold, **settings)
    unbiased(fk.fk, config, chain(20_000), 20_000, log(chain_target(MILD[potential])[1]), 0.008)


LAW = Linear()
EVERY = dict(start=0.0, stop=1.0, every=0.1, inverse_temperature=1.0)
EXACT = {
    "fk": (fk.fk, FK(**EVERY)),
    "fk max": (fk.fk, FK(potential="max", **{**EVERY, "start": 0.7})),
    "tds": (tds.tds, TDS(inverse_temperature=1.0)),
    "das": (tds.tds, TDS(inverse_temperature=1.0, tempering=0.1)),
    "importance": (baselines.importance, Importance(inverse_temperature=1.0)),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_posterior_of_a_gaussian_under_a_linear_reward(name):
    search, config = EXACT[name]
    *_, state = search(LAW.problem(), replace(config, particles=5000))
    mean, var = moments(state.weighted())
    want = LAW.law(1.0)
    assert abs(mean - want[0]) < 0.03
    assert abs(var - want[1]) < 0.03
    plain = LAW.law(0.0)[0]
    assert abs(mean - plain) > 0.4  # and is not the sampler's own law


@pytest.mark.parametrize("name", ["fk", "tds", "das"])
def test_z_of_the_gaussian_is_unbiased_at_four_particles(name):
    search, config = EXACT[name]
    groups = 1500
    unbiased(search, replace(config, particles=4), LAW.problem(range(groups)), groups, LAW.law(1.0)[2], 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fk", "tds", "das"])
def test_z_of_the_gaussian_over_40000_runs(name):
    search, config = EXACT[name]
    *_, state = search(LAW.problem(range(40_000)), replace(config, particles=4))
    ratios = (log_z(state.weighted(), 40_000) - LAW.law(1.0)[2]).exp()
    assert abs(float(ratios.mean()) - 1) < 0.01


def test_several_runs_together_estimate_the_target_too():
    config = FK(particles=40, **EVERY)
    *_, state = fk.fk(LAW.problem(nfe_budget=40 * 10 * 60), config)
    weighted = state.weighted()
    assert len(weighted.x0) == 2400
    assert abs(moments(weighted)[0] - LAW.law(1.0)[0]) < 0.08
    unweighted = weighted._replace(log_weight=torch.zeros_like(weighted.log_weight))
    assert abs(moments(unweighted)[0] - moments(weighted)[0]) > 0


# ------------------------------------------------------------------------------------------------ mutations


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_the_published_last_potential_would_be_found_out(potential, monkeypatch):
    """exp(lambda max_t r_t) / product in place of exp(lambda r(x0)) / product."""
    right, published = "config.inverse_temperature * reward - applied", "config.inverse_temperature * after - applied"
    source = inspect.getsource(fk._fk_step)
    assert right in source
    mutated = dict(vars(fk))
    exec(source.replace(right, published), mutated)
    monkeypatch.setattr(fk, "_fk_step", mutated["_fk_step"])
    weighted = steered(potential=potential)
    assert distance(weighted.x0, weighted.log_weight) > CAUGHT


def test_weights_dropped_where_nothing_is_resampled_would_be_found_out(monkeypatch):
    def dropping(particles, *args):
        return replace(resample(particles, *args), log_weights=torch.zeros_like(particles.log_weights))

    resample = population.resample
    monkeypatch.setattr(population, "resample", dropping)
    weighted = steered(threshold=0.01)
    assert distance(weighted.x0, weighted.log_weight) > CAUGHT


def test_particles_without_their_last_weights_would_be_found_out():
    weighted = steered(threshold=0.01)
    assert distance(weighted.x0, torch.zeros_like(weighted.log_weight)) > CAUGHT


def test_a_proposal_without_its_density_ratio_would_be_found_out(monkeypatch):
    monkeypatch.setattr(tds, "log_ratio", lambda drift, noise: torch.zeros(len(noise), **F64))
    *_, state = tds.tds(LAW.problem(), TDS(particles=4000, inverse_temperature=1.0))
    assert abs(moments(state.weighted())[0] - LAW.law(1.0)[0]) > 0.1


# ------------------------------------------------------------------------------------------------ identities


def samples(search, config, **options):
    """Finished samples of the short problem, one run of six."""
    *_, state = search(SHORT.problem(**options), config)
    return state.weighted().x0


@pytest.mark.parametrize(
    ("search", "config"),
    [
        (fk.fk, FK(6, 0.0)),
        (tds.tds, TDS(6, 0.0)),
        (selection.svdd, SVDD(6, 1, 5.0)),
        (selection.beam, selection.Beam(1, 1)),
        (baselines.importance, Importance(6, 5.0)),
    ],
)
def test_without_a_reward_or_a_choice_each_is_the_plain_sampler(search, config):
    plain = samples(baselines.best_of_n, BestOfN(config.particles))
    torch.testing.assert_close(samples(search, config), plain, rtol=1e-12, atol=1e-12)


def test_a_sample_of_best_of_n_depends_on_its_number_alone():
    few, many = ([*baselines.best_of_n(SHORT.problem(nfe_budget=40), BestOfN(k))][-1].weighted().x0 for k in (2, 5))
    torch.testing.assert_close(few, many, rtol=1e-12, atol=1e-12)


def test_the_weight_of_a_twisted_proposal_is_the_ratio_of_densities():
    problem = Linear(steps=3, low=0.5).problem()
    config = TDS(particles=5, inverse_temperature=1.3, threshold=0.0)
    population = None
    for state in tds.tds(problem, config):
        tensors = state.saved().tensors
        if population is not None and "x" in tensors:
            break
        population = tensors if "x" in tensors else population
    before, after = population, tensors
    path = Path(before["x"])
    said, reward, gradient = problem.graded(path, 1, torch.zeros(5, dtype=torch.long))
    mean, std = problem.kernel(said, 1)
    normal = torch.distributions.Normal
    twisted = normal(mean + std**2 * 1.3 * gradient, std).log_prob(after["x"])
    ratio = (normal(mean, std).log_prob(after["x"]) - twisted)[:, 0]
    torch.testing.assert_close(after["cache.owed"], ratio - 1.3 * reward, rtol=1e-10, atol=1e-10)


def test_the_last_proposal_of_tds_is_the_samplers_own(monkeypatch):
    """Where the last level holds noise as where it does not."""
    drifts = []
    monkeypatch.setattr(tds, "log_ratio", lambda d, z: drifts.append(d) or torch.zeros(len(d), **F64))
    noisy = SHORT.problem()
    noisy.levels = noisy.levels[:-1]
    noisy.costs = noisy.costs[:-1]
    for problem in (SHORT.problem(), noisy):
        drifts.clear()
        *_, _ = tds.tds(problem, TDS(particles=3))
        assert all(drift.abs().min() > 0 for drift in drifts[:-1])
        assert drifts[-1].abs().max() == 0


def test_das_reaches_the_whole_reward_after_87_of_100_steps():
    config = TDS(inverse_temperature=1.0, tempering=0.008)
    assert tempered(config, 0) == 0
    assert tempered(config, 87) == 1
    assert tempered(config, 86) == pytest.approx(1.008**86 - 1)
    assert tempered(config, 86) < 1


def test_cached_predictions_and_gradients_follow_their_particles(monkeypatch):
    """The published code resamples latents and leaves the cached gradient and twist where they were."""
    seen = []
    proposed = tds._proposed

    def check(problem, config, population, particles):
        again, _, gradient = problem.graded(particles.path, population.step, population.rows)
        torch.testing.assert_close(particles.cache["said.x0"], again.x0)
        torch.testing.assert_close(particles.cache["said.gradient"], gradient)
        seen.append(int((particles.parents != torch.arange(particles.size)).sum()))
        return proposed(problem, config, population, particles)

    monkeypatch.setattr(tds, "_proposed", check)
    bent = Linear(steps=4, low=0.5).problem((1, 2))
    bent.reward = lambda x0, groups: (x0[:, 0] * (groups + 1)).sin()  # a gradient of each particle's own
    list(tds.tds(bent, TDS(particles=6, threshold=None)))
    assert sum(seen) > 0


def test_groups_never_mix_and_memory_follows():
    """A memory that names the start of each particle must name the start of its descendants."""
    problem = SHORT.problem((3, 9))
    predicted = problem.predicted

    def remembering(path, i, groups, expert=None):
        start = path.memory.get("start", path.x[:, 0])
        return predicted(path, i, groups)._replace(memory={"start": start, "group": groups.double()})

    problem.predicted = remembering
    for name, config in {"fk": FK(6, 20.0, threshold=None, start=0.0), "beam": selection.Beam(4, 3)}.items():
        states = list(SEARCHES[name].search(problem, config))
        tensors = states[-2].saved().tensors  # the last one has finished
        size = tensors["particles.parents"].shape[1]
        assert torch.equal(tensors["memory.group"], torch.tensor([0.0, 1.0], **F64).repeat_interleave(size))
        for group in range(2):
            mine = tensors["memory.start"].view(2, size)[group]
            starts = torch.cat([problem.start(group, k).x for k in range(size)])[:, 0]
            if name == "fk":
                assert torch.equal(mine, starts[tensors["particles.roots"][group]])
        assert len(mine.unique()) < size  # something was resampled


# ------------------------------------------------------------------------------------------------ costs


K, M, S = 3, 2, 4
COSTS = {  # name: (config, NFEs, reward calls, backward passes), of the short problem, which ends at sigma = 0
    "fk": (FK(K, start=0.0, every=0.5), K * S, K * 3, 0),
    "tds": (TDS(K), K * S, K * S, K * S),
    "svdd": (SVDD(K, M), K * M * S, K * M * S, 0),
    "beam": (selection.Beam(K, M), K * M * S, K * M * S, 0),
    "best-of-n": (BestOfN(K), K * S, K, 0),
    "importance": (Importance(K), K * S, K, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_calls_are_those_of_the_cost_table(name):
    config, *want = COSTS[name]
    problem = SHORT.problem((1, 2))
    rows = {"nfe": 0, "reward_calls": 0}
    predict, reward = problem.predict, problem.reward

    def counted(key, function):
        def call(*args):
            rows[key] += len(args[-1])
            return function(*args)

        return call

    problem.predict, problem.reward = counted("nfe", predict), counted("reward_calls", reward)
    *_, state = SEARCHES[name].search(problem, config)
    assert [int(v[0]) for v in (state.nfe, state.reward_calls, state.gradients)] == want
    assert rows == {"nfe": 2 * want[0], "reward_calls": 2 * want[1]}


@pytest.mark.parametrize(("name", "more"), [("tds", K), ("svdd", K * M), ("beam", K * M), ("fk", 0)])
def test_a_last_level_with_noise_costs_a_reward_call_more(name, more):
    config, nfe, calls, _ = COSTS[name]
    problem = SHORT.problem()
    problem.levels = [*problem.levels[:-1], problem.levels[-2]._replace(sigma=problem.levels[-2].sigma / 9)]
    *_, state = SEARCHES[name].search(problem, config)
    assert int(state.nfe[0]) == nfe
    assert int(state.reward_calls[0]) == calls + more


def test_the_steps_with_a_potential_are_those_of_the_paper():
    assert scheduled(FK(), 100) == [20, 40, 60, 80, 99]
    assert scheduled(FK(start=0.05, stop=0.3, every=0.05), 100) == [5, 10, 15, 20, 25, 30, 99]
    assert scheduled(FK(start=0.0, stop=1.0, every=0.2), 5) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------ choices


def test_svdd_draws_candidates_by_their_rewards():
    reward = torch.tensor([0.3, -0.2, 0.9], **F64).expand(1, 4000, 3)
    problem, config = SHORT.problem(), SVDD(1, 3, 2.0)
    population = fk.Population(None, torch.tensor([0]), torch.tensor([0]))
    places = selection._own_candidate(problem, config, reward, population, 1)[0] - 3 * torch.arange(4000)
    shares = torch.bincount(places, minlength=3) / 4000
    assert (shares - (2 * reward[0, 0]).softmax(0)).abs().max() < 0.03
    best = selection._own_candidate(problem, replace(config, inverse_temperature=torch.inf), reward, population, 1)
    assert (best[0] == 3 * torch.arange(4000) + 2).all()


def test_beam_takes_the_best_of_all():
    reward = torch.tensor([[[0.1, 0.5], [0.4, 0.9], [0.5, 0.0]]], **F64)
    assert selection._top(reward, None, 0).tolist() == [[3, 1, 4]]


@pytest.mark.parametrize(("n", "want"), [(4, 1.0294), (16, 1.7660), (64, 2.3437)])
def test_the_best_of_n_normals(n, want):
    groups = 12_000 // n
    law = Linear(steps=2, low=3.0)
    mean, var, _ = law.law()
    *_, state = baselines.best_of_n(law.problem(range(groups)), BestOfN(n))
    scores = (state.reward - mean) / sqrt(var)
    error = float(scores.std()) / sqrt(groups)
    assert abs(float(scores.mean()) - want) < 4 * error
    assert error < 0.04


@pytest.mark.slow
def test_the_best_of_n_normals_to_a_percent():
    """The sheet's table, by the samples of one run of the search taken n at a time."""
    law = Linear(steps=2, low=3.0)
    mean, var, _ = law.law()
    *_, state = baselines.best_of_n(law.problem(), BestOfN(256 * 800))
    scores = (state.weighted().reward - mean) / sqrt(var)
    for n, want in {4: 1.0294, 16: 1.7660, 64: 2.3437, 256: 2.8269}.items():
        assert float(scores.view(-1, n).max(1).values.mean()) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("n", [1, 4, 256])
def test_the_divergence_of_the_best_of_n(n):
    """Its density is n F^(n - 1) p: the divergence is the integral of log(n u^(n - 1)) n u^(n - 1) over u = F."""
    u = (torch.arange(400_000, **F64) + 0.5) / 400_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(float((density * density.clamp(min=1e-300).log()).mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FK(potential="product"), "no potential 'product'"),
        (lambda: FK(start=0.9, stop=0.2), "potentials from 0.9 to 0.2"),
        (lambda: FK(0), "particles is 0"),
        (lambda: TDS(inverse_temperature=-1.0), "inverse_temperature is -1.0"),
        (lambda: TDS(tempering=0.0), "tempering is 0.0"),
        (lambda: SVDD(candidates=0), "candidates is 0"),
        (lambda: FK(resampling="branching"), "no resampling 'branching'"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_target_of_the_chain_is_not_its_own_law():
    """Farther from it than a sample of the target may be from the target (.04), three times over."""
    target, law = chain_target()[0], chain_target(0.0)[0]
    assert len(target) == STATES
    assert target.sum() == pytest.approx(1)
    assert (target - law).abs().sum() / 2 > 0.12
