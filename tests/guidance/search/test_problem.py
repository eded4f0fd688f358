"""The interface of search: exact counts per group, randomness from seeds alone, micro-batches that change nothing."""

import pytest
import torch

from guidance.guided import guided
from guidance.methods.adaptive import AdaptiveGuidance
from guidance.methods.catalogue import CFG
from guidance.search.problem import Problem, RowCounter, estimate
from solvers.denoiser import Path, Prediction
from solvers.exact import Gaussian, bind
from solvers.noise import cosine, grid
from tests.support.toy import SHAPE, Toy

LEVELS = grid(cosine, 4, 0.98, 0.0)
F64 = {"dtype": torch.float64}


def toy_predict(method=None):
    """Groups are the classes 0, 1, 2 of the toy."""

    def predict(groups):
        conds = {"cond": {"label": groups}, "uncond": {"label": torch.full_like(groups, -1)}}
        return guided(Toy(), method or CFG(2.0), conds, counter=RowCounter())

    return predict


def problem(**options):
    def reward(x0, groups):
        return x0.flatten(1).sum(1) * (groups + 1)

    predict = options.pop("predict", toy_predict())
    return Problem(LEVELS, predict, reward, SHAPE, **{"seeds": (5, 6, 7), "costs": (2,) * 4, **F64, **options})


def path_of(p: Problem, groups) -> Path:
    return Path(torch.cat([p.start(int(g), 0).x for g in groups]))


GROUPS = torch.tensor([0, 2, 2, 1, 0])


def test_micro_batches_and_neighbours_change_nothing():
    whole, split = problem(), problem(micro_batch=2)
    a, b = (p.predicted(path_of(p, GROUPS), 1, GROUPS) for p in (whole, split))
    torch.testing.assert_close(a.x0, b.x0, rtol=1e-12, atol=1e-12)
    alone = whole.predicted(path_of(whole, GROUPS[3:4]), 1, GROUPS[3:4])
    torch.testing.assert_close(a.eps[3:4], alone.eps, rtol=1e-12, atol=1e-12)
    for name, value in whole.spent._asdict().items():
        assert split.spent._asdict()[name].tolist() == (value - torch.tensor([0, 2, 0]) * (name == "nfe")).tolist()


def test_counts_are_each_groups_own():
    p = problem()
    p.predicted(path_of(p, GROUPS), 0, GROUPS)
    p.score(path_of(p, GROUPS).x, GROUPS)
    p.graded(path_of(p, GROUPS), 1, GROUPS)
    assert p.spent.nfe.tolist() == [8, 4, 8]
    assert p.spent.reward_calls.tolist() == [4, 2, 4]
    assert p.spent.gradients.tolist() == [2, 1, 2]


def test_rows_that_adaptive_guidance_leaves_out_are_not_counted():
    p = problem(predict=toy_predict(AdaptiveGuidance(2.0)))
    settled = torch.tensor([True, False, True, False, True])
    path = path_of(p, GROUPS)
    p.predicted(Path(path.x, path.x, {"ag.settled": settled, "ag.steps": torch.ones(5)}), 1, GROUPS)
    assert p.spent.nfe.tolist() == [2, 2, 3]  # two rows of class 0 are settled, one of the two of class 2


def test_an_expert_is_evaluated_by_name_and_counted():
    experts = {"wide": lambda groups: bind(Gaussian(torch.zeros(SHAPE, **F64), 3.0), {})}
    p = problem(experts=experts)
    path = path_of(p, GROUPS)
    want = Gaussian(torch.zeros(SHAPE, **F64), 3.0)(path.x, LEVELS[1], {})
    torch.testing.assert_close(p.predicted(path, 1, GROUPS, "wide").x0, want.x0)
    assert p.spent.nfe.tolist() == [2, 1, 2]


def test_noise_is_a_function_of_seed_and_key_alone():
    p, q = problem(), problem(seeds=(6,))
    assert torch.equal(p.noise(1, 3, 4, n=5), q.noise(0, 3, 4, n=5))
    assert not torch.equal(p.noise(1, 3, 4), p.noise(1, 4, 3))
    assert not torch.equal(p.noise(1, 3), p.noise(0, 3))
    assert 0.4 < p.uniform(0, 1, n=1000).mean() < 0.6
    first = p.noise(0, 0)
    p.noise(0, 1)
    assert torch.equal(first, p.noise(0, 0))


def test_the_kernel_is_where_move_goes_shift_included():
    p = problem()
    path = path_of(p, GROUPS)
    said = Prediction(path.x.tanh(), path.x, shift=0.1 * path.x)
    mean, std = p.kernel(said, 2)
    noise = torch.randn_like(path.x)
    torch.testing.assert_close(p.move(path, said, 2, noise).x, mean + std * noise)
    torch.testing.assert_close(p.move(path, said, 2, noise).x0, estimate(said))


def test_the_gradient_is_that_of_the_reward_of_the_estimate():
    p = problem(seeds=(1,))
    path, group = Path(p.start(0, 0).x), torch.zeros(1, dtype=torch.long)
    _, reward, gradient = p.graded(path, 2, group)
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), **F64)
    h = 1e-6
    up, down = (p.score(p.predicted(Path(path.x + s * direction), 2, group).x0, group) for s in (h, -h))
    torch.testing.assert_close((gradient * direction).sum(), ((up - down) / (2 * h))[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(reward, p.score(p.predicted(path, 2, group).x0, group))


def test_a_budget_is_never_exceeded_and_says_what_fits():
    p = problem(nfe_budget=20, reward_budget=3)
    assert p.affords(20, 3).all()
    assert not p.affords(21).any()
    assert not p.affords(0, 4).any()
    p.predicted(path_of(p, GROUPS), 0, GROUPS)
    assert p.affords(17).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="22 nfe of 20"):
        p.predicted(Path(path_of(p, [0] * 9).x), 0, torch.zeros(9, dtype=torch.long))


def test_the_best_of_each_group_is_kept_and_the_earlier_in_a_tie():
    best = problem().nothing_yet()
    assert best.reward.tolist() == [-torch.inf] * 3
    x0 = torch.arange(4.0, dtype=torch.float64).view(4, 1, 1, 1).expand(4, *SHAPE)
    best = best.improved(x0, torch.tensor([1.0, 3.0, 3.0, -2.0]), torch.tensor([0, 0, 0, 2]))
    assert best.reward.tolist() == [3.0, -torch.inf, -2.0]
    assert best.x0[0].unique().tolist() == [1.0]
    assert best.x0[1].isnan().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eta": 1.5}, "eta is 1.5"),
        ({"seeds": ()}, "a seed for each group"),
        ({"costs": (1,)}, "1 costs for 4 steps"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        problem(**options)


def test_a_deterministic_sampler_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="fk needs a stochastic sampler: with eta = 0"):
        problem(eta=0.0).needs_noise("fk")
    problem(eta=0.5).needs_noise("fk")


def test_a_reward_that_is_not_finite_names_its_group():
    p = problem()
    p.reward = lambda x0, groups: torch.where(groups == 1, torch.nan, 0.0)
    with pytest.raises(ValueError, match="group 1 is nan"):
        p.score(path_of(p, GROUPS).x, GROUPS)
