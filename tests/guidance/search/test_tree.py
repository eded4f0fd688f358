"""Trees: the identities that hold in any tree, targets in closed form, and searches that stop and go on."""

import math
import multiprocessing
import random
import statistics
import time
import warnings
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from guidance.codec import decode, encode
from guidance.guided import guided
from guidance.methods.catalogue import APG
from guidance.search import tree
from guidance.search.dts import DTS, DTSStar, DTSStarPaper, Forest, branching_levels, dts, dts_star
from guidance.search.problem import Problem, RowCounter, Saved, State
from guidance.search.saved import load, save
from guidance.search.tree import BACKUPS, POLICIES, ROOT, Rule, Tree, back_up, descend, probabilities, visit
from solvers.denoiser import Path, Prediction
from solvers.errors import UserError
from solvers.exact import Gaussian, Mixture, bind
from solvers.noise import flow, grid, noise
from tests.support import toy


def karras(steps: int, largest: float, least: float) -> list[float]:
    """rho = 7 levels, and 0."""
    ramp = torch.linspace(largest ** (1 / 7), least ** (1 / 7), steps, dtype=torch.float64)
    return [*(ramp**7).tolist(), 0.0]


# ------------------------------------------------------------------------------------------------ a finite chain
STATES, TURNS = 12, 5


def dirichlet(*shape: int, seed: int) -> Tensor:
    """Rows of distributions over the states, drawn from Dirichlet(0.5)."""
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.full((STATES,), 0.5, dtype=torch.float64)).sample(shape)


FIRST, TURN = dirichlet(seed=0), dirichlet(TURNS, STATES, seed=1)
REWARD = torch.randn(STATES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SCALE = 2.0


class Chain(Problem):
    """Twelve states and five random transition matrices: the target and Z are matrix products."""

    def start(self, group: int, *key: int, n: int = 1) -> Path:
        return Path(moved(FIRST.expand(n, STATES), self.noise(group, *key, n=n)))

    def move(self, path: Path, prediction: Prediction, i: int, noise: Tensor) -> Path:
        return Path(moved(TURN[i][path.x[:, 0].long()], noise))


def moved(shares: Tensor, noise: Tensor) -> Tensor:
    """The states (B, 1) that unit normal noise (B, 1) falls on."""
    u = torch.special.ndtr(noise)
    return (shares.cumsum(1) < u).sum(1, keepdim=True).clamp(max=STATES - 1).double()


def chain(groups: int = 1, **options) -> Chain:
    levels = [noise(1.0, 1.0 - i / TURNS) for i in range(TURNS + 1)]
    still = lambda groups: lambda path, at: Prediction(path.x, 0 * path.x)  # noqa: E731
    reward = lambda x, groups: REWARD[x[:, 0].long()]  # noqa: E731
    return Chain(levels, still, reward, (1,), seeds=range(groups), dtype=torch.float64, **options)


Z = float(torch.linalg.multi_dot([FIRST, *TURN, (SCALE * REWARD).exp()]))


def run(problem: Problem, config: DTS, rounds: int) -> State:
    """The state after so many rounds."""
    *_, state = islice(dts(problem, config), rounds)
    return state


def trees_of(state: State, depth: int) -> list[Tree]:
    """The trees themselves, from what is saved of them."""
    found = decode(dict[str, tree.Packed], state.saved().tensors)
    return [tree.unpacked(found[group], depth) for group in sorted(found, key=int)]


def grown(config: DTS, rounds: int, groups: int = 1) -> list[Tree]:
    return trees_of(run(chain(groups), config, rounds), (config.branches or 5) + 1)  # five steps


# ------------------------------------------------------------------------------------------------ in any tree
def leaf_identity(t: Tree) -> float:
    """How far the probabilities of a descent are from  prod 1/|C| e^(lambda (r - v(root))),  at most."""
    found, error = probabilities(t, SCALE), 0.0
    for leaf, share in found.items():
        width = math.prod(len(t.valued(n)) for n in t.lineage(leaf) if n != leaf)
        error = max(error, abs(share - math.exp(SCALE * (t.values[leaf] - t.values[ROOT])) / width))
    return max(error, abs(sum(found.values()) - 1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("widening", "growth", "parallel"), [(2.0, 0.8, 1), (1.0, 0.5, 1), (2.0, 0.3, 4)])
def test_leaf_identity(policy, widening, growth, parallel):
    """D1: with soft values the descent's probabilities have a closed form, whatever the tree's shape."""
    config = DTS(SCALE, policy, widening=widening, growth=growth, parallel=parallel)
    for t in grown(config, 40 // parallel, groups=2):
        assert len(t.children[ROOT]) > 1 and len(t.leaves) > 10
        assert leaf_identity(t) < 1e-10


def test_leaf_identity_sees_another_backup(monkeypatch):
    mean = lambda values, scale: sum(values) / len(values)  # noqa: E731
    sums = lambda values, scale: math.log(sum(math.exp(scale * v) for v in values)) / scale  # noqa: E731
    for wrong in (mean, sums, max_of):
        monkeypatch.setitem(tree.BACKUPS, "soft", wrong)
        assert leaf_identity(grown(DTS(SCALE), 40)[0]) > 1e-3


def max_of(values, scale):
    return max(values)


@pytest.mark.parametrize(("widening", "growth", "expected"), [(2.0, 0.8, 36), (2.0, 0.7, 13), (1.0, 0.5, 2)])
def test_first_visits_of_the_root_expand_it(widening, growth, expected):
    """D2: while n < C (n + 1)^alpha, n the children; the count N of a node starts at 1."""
    assert expansions(DTS(SCALE, widening=widening, growth=growth)) == expected


def test_expansions_see_a_count_from_zero(monkeypatch):
    from_zero = lambda t, n, r: len(t.children[n]) < max(r.widening * (t.visits[n] - 1) ** r.growth, 1)  # noqa: E731
    monkeypatch.setattr(tree, "is_open", from_zero)
    assert expansions(DTS(SCALE, widening=2.0, growth=0.7)) < 13


def expansions(config: DTS) -> int:
    """Rollouts before the first that starts below the root."""
    for rollouts, state in enumerate(dts(chain(), config), 1):
        if int((state.graph().parent == -1).sum()) < rollouts:
            return rollouts - 1
    raise AssertionError("the search ended without a budget")


def test_a_tree_that_branches_at_the_root_alone_is_importance_sampling():
    """D6: leaf probabilities proportional to e^(lambda r)."""
    found = run(chain(2), DTS(SCALE, widening=1.0, growth=1.0), 30).weighted()
    for group in range(2):
        reward, share = found.reward[found.groups == group], found.log_weight[found.groups == group].exp()
        assert len(reward) == 30
        torch.testing.assert_close(share, (SCALE * reward).softmax(0), rtol=1e-10, atol=0)


def test_values_of_a_small_tree_by_hand():
    """Two branches of two and of one leaf; a rollout counts at every node that it passes, once."""
    t = Tree(2)
    visit(t, ROOT)
    a = t.add(ROOT, None)
    back_up(t, t.add(a, None), 1.0, "soft", 2.0)
    visit(t, a)
    back_up(t, t.add(a, None), 0.0, "soft", 2.0)
    visit(t, ROOT)
    b = t.add(ROOT, None)
    back_up(t, t.add(b, None), -1.0, "soft", 2.0)
    at_a = math.log((math.exp(2) + 1) / 2) / 2
    assert t.values[a] == pytest.approx(at_a, abs=1e-14) and t.values[b] == -1
    assert t.values[ROOT] == pytest.approx(math.log((math.exp(2 * at_a) + math.exp(-2)) / 2) / 2, abs=1e-14)
    assert t.visits == [4, 3, 2, 2, 2, 2] and t.address(t.leaves[-1]) == (1, 0)


def test_soft_backup_of_large_values_neither_overflows_nor_vanishes():
    for scale, values in ((10.0, [1e4, 1e4 - 1]), (1000.0, [-5.0, -5.001])):
        found = tree.log_mean_exp(values, scale)
        gap = math.log((1 + math.exp(scale * (values[1] - values[0]))) / 2) / scale
        assert found == pytest.approx(values[0] + gap, rel=1e-12)


def test_a_reward_that_is_not_finite_is_refused():
    t = Tree(1)
    visit(t, ROOT)
    with pytest.raises(ValueError, match="reward of a leaf is nan"):
        back_up(t, t.add(ROOT, None), math.nan, "soft", 1.0)


# ------------------------------------------------------------------------------------------------ which child
@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    """Boltzmann's shares, the largest upper bound, and equal shares, over a grid of uniform numbers."""
    t = Tree(1)
    for reward in (0.0, 1.0, 0.5):
        visit(t, ROOT)
        back_up(t, t.add(ROOT, None), reward, "soft", SCALE)
    rule, draws = Rule(policy, SCALE, 2.0, 0.8, exploration=0.1), 3000
    picked = [POLICIES[policy](t, ROOT, rule, (i + 0.5) / draws) for i in range(draws)]
    shares = torch.tensor([picked.count(c) / draws for c in t.children[ROOT]])
    expected = {
        "boltzmann": (SCALE * torch.tensor([0.0, 1.0, 0.5])).softmax(0),
        "uct": torch.tensor([0.0, 1.0, 0.0]),
        "uniform": torch.full((3,), 1 / 3),
    }
    torch.testing.assert_close(shares, expected[policy], rtol=0, atol=2 / draws)


def test_uct_turns_to_the_child_that_was_visited_less():
    t = Tree(1)
    for reward in (1.0, 0.9):
        visit(t, ROOT)
        back_up(t, t.add(ROOT, None), reward, "soft", SCALE)
    t.visits = [41, 40, 2]
    bounds = [v + math.sqrt(math.log(41) / n) for v, n in ((1.0, 40), (0.9, 2))]
    assert bounds[1] > bounds[0]
    picked = [tree.uct(t, ROOT, Rule("uct", SCALE, 2.0, 0.8, exploration=c), 0.5) for c in (0.0, 1.0)]
    assert picked == [1, 2]


def test_rollouts_at_once_enter_no_softmax_before_they_have_ended():
    """The first of a round may find nothing but children that are on their way: it opens one more."""
    problem, config = chain(), DTS(SCALE, widening=1.0, growth=0.1, parallel=6)
    first = next(iter(dts(problem, config))).graph()
    assert int((first.parent == -1).sum()) == 6 and not first.value.isnan().any()


# ------------------------------------------------------------------------------------------------ Z and the target
def root_estimates(config: DTS, rounds: int, groups: int) -> Tensor:
    """e^(lambda v(root)) / Z of each group's tree."""
    found = [t.values[ROOT] for t in grown(config, rounds, groups)]
    return (SCALE * torch.tensor(found, dtype=torch.float64)).exp() / Z


def off(estimates: Tensor, truth: float = 1.0) -> float:
    """The mean's distance from the truth in standard errors."""
    return abs(float((estimates.mean() - truth) / (estimates.std() / len(estimates) ** 0.5)))


def test_uniform_build_is_unbiased_for_z_and_the_papers_is_not():
    """E[e^(lambda v)] = Z for a tree whose shape never looks at rewards, at any size; the others are biased low."""
    shape = {"widening": 1.0, "growth": 0.5}
    assert off(root_estimates(DTS(SCALE, "uniform", **shape), 20, 250)) < 4
    for policy in ("boltzmann", "uct"):
        found = root_estimates(DTS(SCALE, policy, **shape), 20, 60)
        assert found.mean() < 1 and off(found) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("widening", "growth"), [(1.0, 0.5), (2.0, 0.3), (2.0, 0.8)])
def test_uniform_build_is_unbiased_for_z_over_many_trees(widening, growth):
    config = DTS(SCALE, "uniform", widening=widening, growth=growth)
    assert off(root_estimates(config, 60, 1500)) < 4


def by_the_book(policy: str, rollouts: int, generator: random.Random) -> float:
    """e^(lambda v(root)) of a tree of the chain, C = 1 and alpha = 1/2: algorithm 1 of https://arxiv.org/abs/2506.20701
    line by line, a node being [state, children, v, N]; c of uct is 1."""
    first, turn, root = FIRST.tolist(), TURN.tolist(), [None, [], 0.0, 1]
    for _ in range(rollouts):
        trail = [root]
        while len(trail) <= TURNS + 1 and len(trail[-1][1]) >= trail[-1][3] ** 0.5:
            _, children, _, visits = trail[-1]
            shares = [math.exp(SCALE * v) if policy == "boltzmann" else 1.0 for *_, v, _ in children]
            bounds = [v + math.sqrt(math.log(visits) / n) for *_, v, n in children]
            pick = children[bounds.index(max(bounds))] if policy == "uct" else generator.choices(children, shares)[0]
            trail.append(pick)
        while len(trail) <= TURNS + 1:
            law = first if trail[-1] is root else turn[len(trail) - 2][trail[-1][0]]
            trail[-1][1].append([generator.choices(range(STATES), law)[0], [], 0.0, 1])
            trail.append(trail[-1][1][-1])
        trail[-1][2] = float(REWARD[trail[-1][0]])
        for node in trail[::-1]:
            if node[1]:
                node[2] = math.log(sum(math.exp(SCALE * v) for *_, v, _ in node[1]) / len(node[1])) / SCALE
            node[3] += 1
    return math.exp(SCALE * root[2])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_bias_of_a_build_is_that_of_the_algorithm(policy):
    """Test 14, C = 1, alpha = 1/2 and 60 rollouts, by 400 trees: the mean of e^(lambda v(root)) / Z is that of
    `by_the_book` within 4 standard errors, and 1 for the uniform build.

    The sheet's .65 (boltzmann) and .51 (uct) are of a chain that it does not give: 40 chains drawn like it have .11 to
    .76 and .07 to .61. Ours has .496 and .347 (600 trees by the book).
    """
    config = DTS(SCALE, policy, widening=1.0, growth=0.5, exploration=1.0)
    found, generator = root_estimates(config, 60, 400), random.Random(0)
    book = torch.tensor([by_the_book(policy, 60, generator) for _ in range(400)], dtype=torch.float64) / Z
    apart = float((found.mean() - book.mean()) / ((found.var() + book.var()) / 400) ** 0.5)
    print(policy, found.mean(), book.mean(), "apart", apart)
    assert abs(apart) < 4
    assert off(found, {"uniform": 1.0, "boltzmann": 0.496, "uct": 0.347}[policy]) < 4


@pytest.mark.slow
def test_uniform_build_is_unbiased_with_rollouts_at_once():
    config = DTS(SCALE, "uniform", widening=1.0, growth=0.5, parallel=4)
    assert off(root_estimates(config, 5, 250)) < 4


LINE = [noise(1.0, s) for s in karras(10, 10.0, 0.05)]


def line(groups: int, **options) -> Problem:
    """F2: data N(1/2, 1), ten DDPM steps, r(x0) = x0. The sampler's own marginal is N(.49505, .58119)."""
    gaussian = bind(Gaussian(torch.tensor([0.5], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)), {})
    reward = lambda x, groups: x[:, 0]  # noqa: E731
    return Problem(LINE, lambda groups: gaussian, reward, (1,), range(groups), dtype=torch.float64, **options)


@pytest.mark.slow
def test_linear_gaussian_chain():
    """Z of the ten steps themselves, in closed form: log Z = .785647, target N(1.07624, .58119)."""
    config = DTS(1.0, "uniform", widening=1.0, growth=0.5)
    state = run(line(200), config, 25)
    roots = torch.tensor([t.values[ROOT] for t in trees_of(state, 6)], dtype=torch.float64)
    assert off(roots.exp(), math.exp(0.785647)) < 4
    found = state.weighted()
    share = found.log_weight.exp() * roots.exp()[found.groups]  # a tree's share of all of them is its estimate of Z
    mean = float((share * found.x0[:, 0]).sum() / share.sum())
    assert mean == pytest.approx(1.07624, abs=0.08)
    plain = float(found.x0.mean())
    assert abs(plain - 0.49505) < 0.12  # the leaves as they were visited follow the base sampler


RING = torch.tensor([[4 * math.cos(math.pi * i / 4), 4 * math.sin(math.pi * i / 4)] for i in range(8)])
TILT = (1.5 * torch.arange(8.0)).softmax(0)


def ring(levels: int = 20) -> Problem:
    """Eight modes of equal weight, and the reward that gives them the weights TILT: Z = 1."""
    base = Mixture(RING, 0.3)
    tilted = replace(base, weights=TILT)
    reward = lambda x, groups: tilted.log_prob(x) - base.log_prob(x)  # noqa: E731
    steps = [noise(1.0, s) for s in karras(levels, 10.0, 0.02)]
    return Problem(steps, lambda groups: bind(base, {}), reward, (2,))


def histogram(x0: Tensor, share: Tensor) -> Tensor:
    """The share of each mode."""
    nearest = torch.cdist(x0.float(), RING).argmin(1)
    return torch.zeros(8, dtype=torch.float64).index_add(0, nearest, share.double())


def variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


@pytest.mark.parametrize("policy", ["uniform", "boltzmann"])
def test_samples_of_an_exact_mixture(policy):
    """A descent has the target's modes, the leaves as they were visited have not; a draw follows the probabilities."""
    state = run(ring(), DTS(1.0, policy, parallel=30), 20)
    found = state.weighted()
    share = found.log_weight.exp()
    visited = histogram(found.x0, torch.full_like(share, 1 / len(share)))
    assert variation(visited, TILT) > 0.3
    assert variation(histogram(found.x0, share), TILT) < {"uniform": 0.06, "boltzmann": 0.2}[policy]
    [t] = trees_of(state, 6)
    u = torch.rand(3000, t.depth, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.tensor([descend(t, 1.0, row) for row in u.tolist()])
    leaves = torch.cat([t.states[leaf].x for leaf in drawn.tolist()])
    assert variation(histogram(leaves, torch.full((3000,), 1 / 3000)), histogram(found.x0, share)) < 0.04


# ------------------------------------------------------------------------------------------------ the largest reward
@pytest.mark.parametrize("backup", BACKUPS)
@pytest.mark.parametrize("policy", POLICIES)
def test_best_seen_is_the_largest_reward_of_all_rollouts(policy, backup):
    seen: list[float] = []
    problem = chain()
    score = problem.reward
    problem.reward = lambda x, groups: (seen.extend(score(x, groups).tolist()), score(x, groups))[1]
    for state in islice(dts(problem, DTS(SCALE, policy, backup)), 40):
        assert float(state.reward) == max(seen) == float(REWARD[int(state.x0)])


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_descent_of_maxima_ends_in_the_best_leaf(policy):
    """D5 and test 15: with backup "max", v(root) is the best reward, and argmax at every node finds its leaf."""
    for t in grown(DTS(SCALE, policy, "max"), 40, groups=3):
        best = max(t.values[leaf] for leaf in t.leaves)
        assert t.values[ROOT] == best
        assert t.values[descend(t, math.inf, [0.5] * t.depth)] == best


def test_dts_star_without_best_seen_descends():
    """Soft values: the greedy descent's leaf; with backup "max" it is the best one again."""
    soft, hard = (replace(DTSStar(), backup=backup, return_best_seen=False) for backup in ("soft", "max"))
    *_, state = islice(dts_star(chain(), soft), 40)
    [t] = trees_of(state, 6)
    assert float(state.reward) == t.values[descend(t, math.inf, [0.5] * t.depth)]
    *_, state = islice(dts_star(chain(), hard), 40)
    [t] = trees_of(state, 6)
    assert float(state.reward) == max(t.values[leaf] for leaf in t.leaves)


def test_dts_without_best_seen_draws_from_the_target():
    """The states' samples of many trees: D1's probabilities, by a z-test of the mean reward."""
    state = run(chain(300), DTS(SCALE, "uniform", return_best_seen=False), 12)
    found = state.weighted()
    shares = found.log_weight.exp()
    mean = torch.zeros(300, dtype=torch.float64).index_add(0, found.groups, shares * found.reward)
    assert off(state.reward - mean, 0.0) < 4
    best = torch.stack([found.reward[found.groups == g].max() for g in range(300)])
    assert off(state.reward - best, 0.0) > 8


# ------------------------------------------------------------------------------------------------ randomness
def by_address(t: Tree) -> dict:
    return {t.address(n): t.states[n] for n in range(1, len(t))}


def test_a_childs_noise_depends_on_seed_path_and_index_alone():
    """Trees that grew by other rules, in other orders, beside other trees, have the same states where they meet."""
    first = by_address(trees_of(run(line(1), DTS(1.0, "boltzmann"), 60), 6)[0])
    others = [
        trees_of(run(line(1), DTS(3.0, "uniform", widening=1.0, growth=0.5), 60), 6)[0],
        trees_of(run(line(3), DTSStar(parallel=3), 20), 6)[0],
    ]
    for other in map(by_address, others):
        shared = first.keys() & other.keys()
        assert len(shared) > 20 and len({len(a) for a in shared}) == 6
        for address in shared:
            torch.testing.assert_close(first[address].x, other[address].x, rtol=0, atol=1e-12)
    elsewhere = by_address(trees_of(run(line(2), DTS(1.0, "boltzmann"), 60), 6)[1])
    assert not any(elsewhere[a].x.equal(first[a].x) for a in first.keys() & elsewhere.keys())
    xs = torch.cat([state.x for state in first.values()])
    assert len(xs.unique()) == len(xs)


def test_no_two_edges_share_their_noise():
    """Keys are all different, also those of children of one rank under different parents."""
    problem, seen = line(2), []
    noise = problem.noise
    problem.noise = lambda *key, n=1: (seen.append(key), noise(*key, n=n))[1]
    run(problem, DTS(1.0, "uniform", widening=1.0, growth=0.5), 30)
    assert len(seen) > 200 and len(set(seen)) == len(seen)


@pytest.mark.parametrize("policy", POLICIES)
def test_trees_grow_beside_each_other_as_alone(policy):
    """Several prompts in one batch, in micro-batches or not: each tree is the one that it would be alone."""
    config = DTS(SCALE, policy, widening=1.5, growth=0.6)
    together = trees_of(run(chain(4, micro_batch=3), config, 30), 6)
    for group, beside in enumerate(together):
        one = replace(chain(4), seeds=[group])
        assert same(beside, trees_of(run(one, config, 30), 6)[0])


def same(a: Tree, b: Tree) -> bool:
    x, y = (encode(tree.packed(one)).tensors for one in (a, b))
    return x.keys() == y.keys() and all(x[name].equal(y[name]) for name in x)


# ------------------------------------------------------------------------------------------------ the reward's scale
def scaled(problem: Problem, factor: float, constant: float) -> Problem:
    """The same with the reward factor r + constant."""
    reward = problem.reward
    problem.reward = lambda x, groups: factor * reward(x, groups) + constant
    return problem


SOFT = DTSStar(backup="soft", inverse_temperature=6.0)


@pytest.mark.parametrize("config", [DTSStar(), SOFT, DTS(6.0, widening=1.0, growth=0.5, unit="sd")])
def test_in_units_of_its_spread_the_reward_s_scale_changes_nothing(config):
    """Rewards times 1000 plus a constant: the same trees, and values to the rounding."""
    for make in (chain, line):
        one = trees_of(run(make(4), config, 60), 6)
        other = trees_of(run(scaled(make(4), 1000.0, 3.0), config, 60), 6)
        for a, b in zip(one, other, strict=True):
            assert (a.parents, a.visits) == (b.parents, b.visits)
            assert [1000 * v + 3 for v in a.values] == pytest.approx(b.values, rel=1e-9, nan_ok=True)


def test_in_the_reward_s_own_units_its_scale_changes_the_search():
    config = DTSStarPaper(widening=1.0, growth=0.5)
    one, other = (trees_of(run(scaled(line(4), factor, 0.0), config, 60), 6) for factor in (1.0, 0.01))
    assert [t.parents for t in one] != [t.parents for t in other]


def test_soft_values_are_of_the_spread_that_all_rewards_have():
    """A reward that widens the spread changes lambda / sd, and with it the value of every node."""
    for t in grown(SOFT, 40, groups=3):
        lam = 6 / statistics.pstdev(t.values[leaf] for leaf in t.leaves)
        for node in range(len(t)):
            if not t.is_leaf(node):
                below = torch.tensor([t.values[c] for c in t.valued(node)], dtype=torch.float64)
                want = ((lam * below).logsumexp(0) - math.log(len(below))) / lam
                assert t.values[node] == pytest.approx(float(want), rel=1e-9)


def test_rewards_that_are_all_equal_have_no_spread():
    """Among equal children the least visited is followed, as under any unit."""
    flat = run(scaled(line(2), 0.0, 0.1), DTSStar(), 30)
    assert [t.visits for t in trees_of(flat, 6)] == [
        t.visits for t in trees_of(run(scaled(line(2), 0.0, 0.1), DTSStar(unit="reward"), 30), 6)
    ]


@pytest.mark.parametrize(
    ("budget", "shape"),
    [
        ({}, (1.0, 0.5)),
        ({"nfe_budget": 999 * TURNS}, (1.0, 0.5)),
        ({"nfe_budget": 1000 * TURNS}, (2.0, 0.8)),
        ({"nfe_budget": 1000 * TURNS, "reward_budget": 999}, (1.0, 0.5)),
    ],
)
def test_a_tree_of_few_images_is_narrow(budget, shape):
    for config, want in ((DTSStar(), shape), (DTSStarPaper(), (2.0, 0.8)), (DTSStar(widening=3.0), (3.0, shape[1]))):
        found = Forest(chain(**budget), config).config
        assert (found.widening, found.growth) == want


def test_a_larger_budget_leaves_a_tree_s_shape():
    kept = run(chain(nfe_budget=60), DTSStar(), 8).saved()
    forest = Forest(chain(nfe_budget=2000 * TURNS), DTSStar())
    forest.restore(kept)
    assert (forest.config.widening, forest.config.growth) == (1.0, 0.5)
    with pytest.raises(UserError, match="the saved tree has widening 1.0, this search 2.0"):
        Forest(chain(nfe_budget=2000 * TURNS), DTSStar(widening=2.0)).restore(kept)


def test_a_tree_that_was_saved_before_there_were_units_goes_on():
    kept = run(budgeted(), CONFIG, 3).saved()
    kept = kept._replace(info={**kept.info, "search": {k: v for k, v in kept.info["search"].items() if k != "unit"}})
    assert identical(finished(budgeted(), kept), finished(budgeted()))
    with pytest.raises(UserError, match="the saved tree has unit reward, this search sd"):
        list(dts(budgeted(), replace(CONFIG, unit="sd"), kept))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.001])
def test_dts_star_beats_best_of_n_whatever_the_reward_s_scale(factor):
    """On the Gaussian chain, in standard deviations of its images; the best of n normals is 1.87, 2.16 and 2.51."""
    trees = 150
    problem = scaled(line(trees, nfe_budget=100 * len(LINE[1:])), factor, 0.0)
    at: dict[int, float] = {}
    for state in dts_star(problem, DTSStar()):
        images = float(state.nfe.double().mean()) / len(LINE[1:])
        for n in (20, 40, 100):
            if images <= n:
                at[n] = float((state.reward / factor - 0.49505).mean()) / 0.58119**0.5
    assert at[20] > 1.87 + 0.2 and at[40] > 2.16 + 0.3 and at[100] > 2.51 + 0.5


# ------------------------------------------------------------------------------------------------ stopping and going on
CONFIG = DTS(SCALE, widening=1.5, growth=0.6, parallel=2)
ROUNDS = 12


def finished(problem: Problem, kept: Saved | None = None) -> State:
    *_, state = dts(problem, CONFIG, kept)
    return state


def budgeted() -> Chain:
    return chain(3, nfe_budget=110, reward_budget=33)


def identical(a: State, b: State) -> bool:
    x, y = a.saved(), b.saved()
    tensors = x.tensors.keys() == y.tensors.keys() and all(x.tensors[k].equal(y.tensors[k]) for k in x.tensors)
    return tensors and x.info == y.info and a.x0.equal(b.x0) and a.nfe.equal(b.nfe)


@pytest.mark.parametrize("rounds", range(1, 10))
def test_a_search_goes_on_from_its_file_as_if_nothing_had_happened(tmp_path, rounds):
    file = tmp_path / "tree.safetensors"
    save(file, run(budgeted(), CONFIG, rounds).saved())
    assert identical(finished(budgeted(), load(file)), finished(budgeted()))


@pytest.mark.parametrize("calls", range(0, 40, 3))
def test_a_search_killed_anywhere_goes_on_to_the_same_end(tmp_path, calls):
    """It dies in the middle of a rollout, at its n-th evaluation; the file holds the last round."""
    file = tmp_path / "tree.safetensors"
    problem, left = budgeted(), [calls]
    move = problem.move

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return move(*args)

    problem.move = dying
    with pytest.raises(KeyboardInterrupt):
        for state in dts(problem, CONFIG):
            save(file, state.saved())
    kept = load(file) if file.exists() else None
    assert identical(finished(budgeted(), kept), finished(budgeted()))


def test_a_search_that_was_over_goes_nowhere():
    """It gives the state that it had, and spends nothing."""
    end, problem = finished(budgeted()), budgeted()
    (state,) = dts(problem, CONFIG, end.saved())
    assert identical(state, end)
    assert torch.equal(problem.spent.nfe, end.nfe)


def _save_for_ever(file: str) -> None:
    for state in dts(chain(3), CONFIG):
        save(file, state.saved())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.4, 0.8])
def test_sigkill_leaves_a_whole_tree_that_goes_on(tmp_path, seconds):
    file = tmp_path / "tree.safetensors"
    process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(str(file),))
    process.start()
    while not file.exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    kept = load(file)
    rounds = sum(kept.info["spent"]["reward_calls"]) + 6
    a = next(state for state in dts(chain(3), CONFIG, kept) if int(state.reward_calls.sum()) >= rounds)
    b = next(state for state in dts(chain(3), CONFIG) if state.reward_calls.equal(a.reward_calls))
    assert identical(a, b)


def test_another_search_is_no_continuation():
    kept = run(budgeted(), CONFIG, 2).saved()
    for problem, config, named in (
        (budgeted(), replace(CONFIG, widening=3.0), "widening 1.5, this search 3.0"),
        (replace(budgeted(), seeds=[7, 8, 9]), CONFIG, "seeds"),
    ):
        with pytest.raises(ValueError, match=named):
            next(iter(dts(problem, config, kept)))


def guided_problem(*seeds: int) -> Problem:
    """APG on the toy; a group's class and the sign of its reward are those of its seed."""

    def predict(groups: Tensor):
        own = [seeds[g] % toy.K for g in groups.tolist()]
        conds = {"cond": toy.labels(*own), "uncond": toy.labels(*[-1] * len(own))}
        return guided(toy.Toy(), APG(3.0), conds, counter=RowCounter())

    def reward(x: Tensor, groups: Tensor) -> Tensor:
        return x.flatten(1).mean(1) * (1 - 2 * torch.tensor(seeds)[groups])

    levels = grid(flow, 6, 0.99, 0.0)
    return Problem(levels, predict, reward, toy.SHAPE, seeds, costs=(2,) * 6, dtype=torch.float64)


def test_memory_of_a_guidance_follows_its_node():
    """APG's momentum is in the path: it is stored, split, joined and saved with the node; and a prompt's prediction and
    reward are its own."""
    config = DTS(5.0, widening=1.0, growth=0.5, branches=3)
    whole = run(guided_problem(0, 1), config, 12)
    halfway = run(guided_problem(0, 1), config, 6).saved()
    assert any(name.startswith("0.memory.") for name in halfway.tensors)
    *_, again = islice(dts(guided_problem(0, 1), config, halfway), 6)
    assert identical(whole, again)
    for group, beside in enumerate(trees_of(whole, 4)):
        [alone] = trees_of(run(guided_problem(group), config, 12), 4)
        assert alone.parents == beside.parents
        torch.testing.assert_close(tree.packed(alone).x, tree.packed(beside).x, rtol=1e-10, atol=1e-10)
        assert alone.values == pytest.approx(beside.values, abs=1e-10)


# ------------------------------------------------------------------------------------------------ costs and refusals
@pytest.mark.parametrize("parallel", [1, 3])
def test_costs_are_the_remaining_steps_and_one_reward_call_each(parallel):
    """Counted where they happen: every row that is predicted, and every row that is scored."""
    problem, rows, scored = chain(2, nfe_budget=100), [0, 0], [0, 0]
    predict, reward = problem.predict, problem.reward

    def counting(groups):
        for g in groups.tolist():
            rows[g] += 1
        return predict(groups)

    def counted(x, groups):
        for g in groups.tolist():
            scored[g] += 1
        return reward(x, groups)

    problem.predict, problem.reward = counting, counted
    *_, state = dts(problem, DTS(SCALE, widening=1.0, growth=0.5, parallel=parallel))
    assert state.nfe.tolist() == rows and state.reward_calls.tolist() == scored and not state.gradients.any()
    for group, t in enumerate(trees_of(state, 6)):
        drawn = sum(1 for n in range(1, len(t)) if t.depths[n] > 1)  # five branches, five steps: one step a node
        assert rows[group] == drawn and scored[group] == len(t.leaves)
    assert all(100 - TURNS < spent <= 100 for spent in rows)


@pytest.mark.parametrize(("config", "full"), [(DTSStarPaper(), 36), (DTSStar(), 2)])
def test_a_budget_that_ends_before_the_root_is_full_is_told(config, full):
    """All rollouts then start from new noise, as those of best-of-n do; with one more the tree branches."""

    def roots(**budget: int) -> tuple[int, int]:
        *_, state = dts_star(chain(**budget), config)
        return int((state.graph().parent == -1).sum()), int(state.reward_calls)

    for budget in ({"nfe_budget": TURNS * full}, {"reward_budget": full}):
        with pytest.warns(UserWarning, match=f"pays for {full} rollouts, .* all of them start from new noise"):
            assert roots(**budget) == (full, full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert roots(reward_budget=full + 1) == (full, full + 1)


def test_a_leaf_that_is_visited_again_costs_nothing():
    """Once all nodes on the way are full, a rollout ends in a leaf: it counts as a visit and is backed up again."""
    config = DTS(SCALE, widening=1.0, growth=0.01)  # one child each, a second one after 2^100 visits ... or two
    state = run(chain(), config, 40)
    [t] = trees_of(state, 6)
    assert t.rollouts == 40 and int(state.reward_calls) == len(t.leaves) < 40


def test_reward_budget_is_kept():
    *_, state = dts(chain(2, reward_budget=7), DTS(SCALE, parallel=3))
    assert state.reward_calls.tolist() == [7, 7]


def test_a_budget_under_one_rollout_is_refused():
    with pytest.raises(ValueError, match=r"one rollout costs 5 NFEs and a reward call"):
        next(iter(dts(chain(nfe_budget=4), DTS(SCALE))))


@pytest.mark.parametrize("search", [dts, dts_star])
def test_a_deterministic_sampler_is_refused(search):
    with pytest.raises(ValueError, match="needs a stochastic sampler"):
        search(chain(eta=0.0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "greedy"}, "no policy 'greedy'"),
        ({"backup": "mean"}, "no backup 'mean'"),
        ({"inverse_temperature": 0.0}, "inverse_temperature is 0.0"),
        ({"inverse_temperature": math.inf}, "inverse_temperature is inf: it must be above 0, and finite"),
        ({"growth": 1.5}, "growth is 1.5"),
        ({"growth": 0.0}, "growth is 0.0"),
        ({"widening": 0.0}, "widening is 0.0"),
        ({"branches": 0}, "branches is 0"),
        ({"parallel": 0}, "parallel is 0"),
        ({"exploration": -1.0}, "exploration is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        DTS(**options)


def test_more_branches_than_steps_are_refused():
    with pytest.raises(ValueError, match="6 branches and 5 steps"):
        dts(chain(), DTS(branches=6))


def test_branching_levels_are_the_papers():
    assert branching_levels(50, 5) == [0, 10, 20, 30, 40, 50]
    assert branching_levels(100, 5) == [0, 20, 40, 60, 80, 100]
    assert branching_levels(25, 4) == [0, 6, 12, 19, 25] and branching_levels(3, 3) == [0, 1, 2, 3]


def test_graph_and_latents_are_those_of_the_trees():
    state = run(chain(2), DTS(SCALE), 15)
    graph, found = state.graph(), trees_of(state, 6)
    assert len(graph.parent) == sum(len(t) - 1 for t in found)
    assert (graph.parent < torch.arange(len(graph.parent))).all()
    children = graph.parent >= 0
    assert graph.groups[children].equal(graph.groups[graph.parent[children]])
    assert (graph.level[children] == graph.level[graph.parent[children]] + 1).all()
    assert (graph.level[~children] == 0).all()
    leaves = graph.level == TURNS
    assert graph.value[leaves].equal(
        torch.tensor([t.values[leaf] for t in found for leaf in t.leaves], dtype=torch.float64)
    )


def test_states_are_kept_on_the_cpu_in_storage_of_their_own():
    """A row that kept the batch that it was in alive would take the memory of all of them."""
    forest = Forest(chain(3), DTS(SCALE))
    assert forest.grow() and forest.grow()
    states = [state for t in forest.trees for state in t.states[1:]]
    assert len(states) == 3 * 2 * 6
    assert all(state.x.device.type == "cpu" and state.x.untyped_storage().nbytes() == 8 for state in states)
