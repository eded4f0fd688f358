"""What noise optimisation is made of, against closed forms: regularisers, optimisers, searches without a gradient."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from scipy import stats

from difftune.errors import UserError
from difftune.reno import zero_order
from difftune.reno.first_order import FIRST_ORDER, LBFGS, SGD, Adam, _two_loops, clipped
from difftune.reno.named import optimizer_named, sized
from difftune.reno.paper import PAPER, learning_rate, levels_at
from difftune.reno.regularizers import (
    CAP,
    REGULARIZERS,
    chi,
    chi_log_density,
    covariance_bound,
    dno,
    mean_bound,
    spectral,
)
from difftune.reno.zero_order import SPSA, ZERO_ORDER, Neighbours, neighbours, ranked, started
from tests.support import pipelines

SIZE = 16_384
GAMMA = 0.01


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the norm


@pytest.mark.parametrize("dimension", [3, 256, SIZE])
def test_density_is_chis(dimension):
    r = torch.linspace(0.5, 1.5, 7, dtype=torch.float64) * dimension**0.5
    expected = torch.from_numpy(stats.chi.logpdf(r.numpy(), dimension))
    assert torch.allclose(chi_log_density(r, dimension), expected, rtol=1e-9, atol=1e-7)


def test_regularizers_gradient_is_along_the_noise_and_vanishes_on_the_shell():
    x = draws(3, 4, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(chi(x).sum(), x)
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(gradient, (norm - 255 / norm) * x / norm)
    shell = (x * 255**0.5 / norm).detach().requires_grad_()
    assert torch.autograd.grad(chi(shell).sum(), shell)[0].abs().max() < 1e-12


def test_the_shell_has_the_least_value_and_the_curvature_of_the_sheet():
    """|eps|^2 / 2 - (D - 1) log |eps| is -71,298.8 at its minimum, with a second derivative of 2."""
    radius = torch.tensor(float(SIZE - 1), dtype=torch.float64).sqrt().requires_grad_()
    value = radius**2 / 2 - (SIZE - 1) * radius.log()
    assert abs(value.item() + 71_298.8) < 0.05
    (slope,) = torch.autograd.grad(-chi_log_density(radius, SIZE), radius, create_graph=True)
    assert abs(slope.item()) < 1e-9 and abs(torch.autograd.grad(slope, radius)[0].item() - 2) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regularizer_survives_half_precision_at_65536_elements(dtype):
    """|eps|^2 is about 65,536, and float16 ends at 65,504."""
    x = draws(2, 65_536).to(dtype).requires_grad_()
    value = chi(1.01 * x)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()
    assert value.dtype == torch.float64


# ------------------------------------------------------------------------------------------------ beyond the norm


def test_gaussian_noise_lies_on_dnos_plateau_as_often_as_it_must():
    """m |mean|^2 is chi-squared with 4 degrees of freedom: below 8 log 2 with a probability of 0.764."""
    blocks = draws(2000, 1024).unflatten(1, (-1, 4))
    expected, error = stats.chi2.cdf(8 * log(2), 4), sqrt(0.764 * 0.236 / 2000)
    assert abs((mean_bound(blocks) == CAP).double().mean().item() - expected) < 4 * error
    assert (covariance_bound(blocks, 256) == CAP).double().mean() > 0.99


def test_dnos_plateau_has_no_gradient_and_a_pattern_is_not_on_it():
    flat = next(x for x in draws(20, 1, 4, 8, 8) if mean_bound(x.view(1, -1, 4)).item() == CAP).requires_grad_()
    blocks = flat.view(1, -1, 4)
    value = mean_bound(blocks) + covariance_bound(blocks, blocks.shape[1])
    assert value.item() == 2 * CAP
    assert torch.autograd.grad(value.sum(), flat)[0].abs().max() == 0
    ones = torch.ones(1, 4, 16, 16, dtype=torch.float64)
    row = draws(1, 4, 1, 16, seed=1).expand(1, 4, 16, 16)
    pattern = row / row.norm() * ones.norm()
    usual = dno(draws(8, 4, 16, 16)).max()
    for unusual in (ones, pattern):
        assert abs(chi(unusual) - chi(draws(1, 4, 16, 16))) < 3  # the norm tells nothing
        assert dno(unusual) > 3 * usual


def test_dno_is_the_sheets_formula_on_one_block_size():
    x = 3 * draws(1, 16)
    b = x.view(4, 4)
    c = b.T @ b / 4
    mean = min(-4 * b.mean(0).square().sum().item() / 8, -log(2))
    excess = max(sqrt(1 + torch.linalg.eigvalsh(c - torch.eye(4)).abs().max()) - 1 - 1, 0)
    assert mean_bound(b).item() == pytest.approx(mean)
    assert covariance_bound(b, 4).item() == pytest.approx(min(-2 * excess**2, -log(2)))


def test_spectral_is_one_per_band_in_expectation_and_sees_a_smooth_noise():
    noise = draws(600, 4, 16, 16)
    bands = 4 * (((16 * 16 - 4) // 2) // 16)
    extra = spectral(noise) - chi(noise)
    assert abs(extra.mean() - bands) < 4 * extra.std() / 600**0.5
    smooth = torch.nn.functional.avg_pool2d(noise[:4], 3, stride=1, padding=1)
    smooth = smooth / smooth.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 1023**0.5
    assert (chi(smooth) < chi(noise).max()).all()
    assert (spectral(smooth) - chi(smooth)).min() > 5 * extra.max()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_is_of_each_sample_alone_in_float64_with_a_finite_gradient(name):
    x = draws(3, 4, 16, 16).half().requires_grad_()
    found = REGULARIZERS[name](x)
    assert found.shape == (3,) and found.dtype == torch.float64
    assert torch.allclose(found[1:2], REGULARIZERS[name](x[1:2]), rtol=1e-12)
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()


def test_a_noise_that_a_regularizer_cannot_read_is_named():
    with pytest.raises(ValueError, match="'dno' takes blocks of 4, and the noise has 27"):
        dno(torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="'spectral' needs 16 frequencies"):
        spectral(torch.zeros(1, 4, 4, 4))


# ------------------------------------------------------------------------------------------------ optimisers


def linear(scale: float):
    """Loss gamma K(x) - scale <c, x>, |c| = 1, and its gradient, of x (B, D)."""
    c = torch.zeros(SIZE, dtype=torch.float64)
    c[:4] = 0.5

    def evaluate(x):
        norm = x.norm(dim=1, keepdim=True)
        loss = GAMMA * (norm**2 / 2 - (SIZE - 1) * norm.log()).squeeze(1) - scale * (x @ c)
        return loss, GAMMA * (norm - (SIZE - 1) / norm) * x / norm - scale * c

    return c, evaluate


def optimum(scale: float) -> float:
    s = scale / GAMMA
    return (s + sqrt(s**2 + 4 * (SIZE - 1))) / 2


def walk(optimizer, evaluate, x, updates):
    memory, path = optimizer.start(x), [x]
    for _ in range(updates):
        x, memory = optimizer.step(x, *evaluate(x), memory)
        path.append(x)
    return path


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 187.4155), (0.1, 133.0937)])
def test_optimum_of_a_linear_reward(scale, expected):
    """eps* = rho c with rho = (s + sqrt(s^2 + 4 (D - 1))) / 2, s = scale / gamma."""
    assert abs(optimum(scale) - expected) < 1e-4
    c, evaluate = linear(scale)
    optimizer, updates = (SGD(learning_rate(SIZE)), 500) if scale == 1 else (LBFGS(max_step=60.0), 60)
    *_, x = walk(optimizer, evaluate, draws(1, SIZE), updates)
    assert abs(x.norm().item() - optimum(scale)) < 1e-6
    assert (x @ c).item() / x.norm().item() > 1 - 1e-9


def test_the_papers_49_updates_and_their_bounds():
    """Norm 187.86, cosine 0.948 to c and 0.32 to the start, about; each update and the whole way within its bound."""
    c, evaluate = linear(1.0)
    path = walk(SGD(5.0), evaluate, draws(1, SIZE), 49)
    x, start = path[-1], path[0]
    assert x.norm().item() == pytest.approx(187.86, abs=0.3)
    assert (x @ c).item() / x.norm().item() == pytest.approx(0.948, abs=0.01)
    assert torch.cosine_similarity(x, start).item() == pytest.approx(0.32, abs=0.02)
    steps = [(b - a).norm().item() for a, b in zip(path[:-1], path[1:], strict=True)]
    assert steps[0] == pytest.approx(5 * 0.1 * 1.9, rel=1e-5)
    assert max(steps) <= 5 * 0.1 / (1 - 0.9) + 1e-9
    assert (x - start).norm().item() <= 204.7
    assert (x - start).norm().item() == pytest.approx(190.9, abs=1)


def test_lbfgs_finds_the_optimum_in_few_evaluations_and_a_quadratics_exactly():
    c, evaluate = linear(1.0)
    *_, x = walk(LBFGS(max_step=60.0), evaluate, draws(1, SIZE), 40)
    assert abs(x.norm().item() - optimum(1.0)) < 1e-6 and (x @ c).item() / x.norm().item() > 1 - 1e-9
    scales = torch.linspace(1, 50, 12, dtype=torch.float64)
    target = draws(3, 12, seed=2)
    path = walk(LBFGS(), lambda x: ((scales * (x - target) ** 2).sum(1) / 2, scales * (x - target)), draws(3, 12), 60)
    assert torch.allclose(path[-1], target, atol=1e-8)


def test_lbfgs_goes_back_where_the_loss_did_not_fall():
    """x^4 from far away with a first step past the minimum: no point that is kept is worse than the one before."""
    path = walk(LBFGS(first_step=30.0), lambda x: (x.pow(4).sum(1), 4 * x**3), draws(1, 4), 40)
    losses = [x.pow(4).sum().item() for x in path]
    assert losses[1] > losses[0] and losses[-1] < 1e-6 * losses[0]
    assert (path[2] - path[0]).norm().item() == pytest.approx(15.0)


def test_two_loops_are_the_dense_bfgs_update():
    torch.manual_seed(0)
    s = torch.randn(1, 3, 5, dtype=torch.float64)
    a = torch.randn(5, 5, dtype=torch.float64)
    y = s @ (a @ a.T + torch.eye(5))
    h = (s[0, -1] @ y[0, -1]) / (y[0, -1] @ y[0, -1]) * torch.eye(5, dtype=torch.float64)
    for si, yi in zip(s[0], y[0], strict=True):
        v = torch.eye(5) - torch.outer(si, yi) / (yi @ si)
        h = v @ h @ v.T + torch.outer(si, si) / (yi @ si)
    g = torch.randn(1, 5, dtype=torch.float64)
    assert torch.allclose(_two_loops(g, s, y), g @ h)
    blank = torch.zeros(1, 2, 5, dtype=torch.float64)
    assert torch.allclose(_two_loops(g, torch.cat([blank, s], 1), torch.cat([blank, y], 1)), g @ h)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.3, grad_clip=None), lambda x: torch.optim.SGD(x, 0.3, momentum=0.9, nesterov=True)),
        (SGD(0.3, 0.0, grad_clip=None), lambda x: torch.optim.SGD(x, 0.3)),
        (Adam(0.1, epsilon=1e-2), lambda x: torch.optim.Adam(x, 0.1, eps=1e-2)),
    ],
)
def test_updates_are_torchs(ours, theirs):
    scales = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    x = draws(2, 7).requires_grad_()
    optimizer = theirs([x])
    path = walk(ours, lambda z: ((scales * z**2).sum(1), torch.sin(scales * z)), x.detach(), 6)
    for expected in path[1:]:
        x.grad = torch.sin(scales * x.detach())
        optimizer.step()
        assert torch.allclose(x, expected, atol=1e-12)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_samples_of_a_batch_move_as_they_would_alone(name):
    """Also where their losses are of another scale, and one leaves the batch half-way."""
    optimizer = FIRST_ORDER[name](**({"learning_rate": 0.5} if name == "sgd" else {}))
    scales = torch.tensor([[1.0], [30.0], [1e-3]], dtype=torch.float64)
    f = lambda x, s: ((s * x**2).sum(1), 2 * s * x)  # noqa: E731
    both = walk(optimizer, lambda x: f(x, scales), draws(3, 5), 8)[-1]
    for i in range(3):
        alone = walk(optimizer, lambda x, i=i: f(x, scales[i : i + 1]), draws(3, 5)[i : i + 1], 8)[-1]
        assert torch.allclose(both[i], alone[0], rtol=1e-10)
    x, memory = draws(3, 5), optimizer.start(draws(3, 5))
    x, memory = optimizer.step(x, *f(x, scales), memory)
    left = optimizer.step(x[1:], *f(x[1:], scales[1:]), {k: v[1:] for k, v in memory.items()})[0]
    assert torch.allclose(left, optimizer.step(x, *f(x, scales), memory)[0][1:], rtol=1e-10)


def test_each_samples_gradient_is_clipped_by_itself():
    g = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    assert torch.allclose(clipped(g, 0.1), torch.tensor([[0.06, 0.08], [0.03, 0.04]]), atol=1e-6)
    assert clipped(g, None) is g


# ------------------------------------------------------------------------------------------------ without a gradient


@pytest.mark.parametrize("cosine", [0.95, 0.5])
def test_a_neighbour_has_the_pivots_norm_and_the_cosine(cosine):
    pivot = 3 * draws(SIZE)
    near = neighbours(pivot, cosine, draws(5, SIZE, seed=1))
    assert torch.allclose(near.norm(dim=1) / pivot.norm(), torch.ones(5, dtype=torch.float64), atol=1e-6)
    found = near @ pivot / (near.norm(dim=1) * pivot.norm())
    assert torch.allclose(found, torch.full_like(found, cosine), atol=1e-6)
    among = torch.corrcoef(near)[0, 1:]
    assert (among - cosine**2).abs().max() < 0.05  # each goes its own way


def sphere(x: torch.Tensor) -> torch.Tensor:
    return -(x - 2).square().sum(dim=1)


def follow(optimizer, z, iterations, f=sphere, seed=3):
    search, asked = started(optimizer, z, seed, [])
    seen = [asked]
    for _ in range(iterations):
        asked = search.send(f(asked))
        seen.append(asked)
    return seen


@pytest.mark.parametrize("name", ZERO_ORDER)
def test_a_search_begins_with_its_noise_rises_and_is_resumed_by_what_it_was_told(name):
    if name == "cma":
        pytest.importorskip("cma")
    optimizer = ZERO_ORDER[name](**({"learning_rate": 1.0, "grad_clip": None} if name == "spsa" else {}))
    optimizer = replace(optimizer, candidates=8, **({"learning_rate": 0.05} if name == "spsa" else {}))
    z = draws(6)
    asked = follow(optimizer, z, 20)
    assert torch.equal(asked[0], z[None]) and {len(a) for a in asked[1:]} == {8}
    best = [sphere(a).max() for a in asked]
    if name != "neighbours":  # which stays on the shell
        assert best[-1] > best[0] / 20
    assert best[-1] > best[0]
    _, again = started(optimizer, z, 3, [sphere(a) for a in asked[:12]])
    assert torch.equal(again, asked[12])
    assert not torch.equal(follow(optimizer, z, 1, seed=4)[1], asked[1])


def test_neighbours_keep_a_pivot_that_nothing_beats():
    z = draws(8)
    asked = follow(Neighbours(4), z, 3, f=lambda x: -(x - z).square().sum(dim=1))
    for near in asked[1:]:
        assert torch.allclose(near @ z / z.norm() ** 2, torch.full((4,), 0.95, dtype=torch.float64))


def test_spsa_is_spalls_step_on_a_linear_function():
    """f = <c, x>: a pair says exactly <c, d>, so that the step is rate mean_j <c, d_j> d_j."""
    c, z = draws(5, seed=1), draws(5)
    _, pairs, second = follow(SPSA(4, 0.2, 0.1, 0.0, None), z, 2, f=lambda x: x @ c)
    signs = (pairs[:2] - z) / 0.2
    assert torch.allclose(signs.abs(), torch.ones_like(signs)) and torch.allclose(pairs[2:], z - 0.2 * signs)
    moved = z + 0.1 * ((signs @ c)[:, None] * signs).mean(dim=0)
    assert torch.allclose((second[:2] + second[2:]) / 2, moved.expand(2, -1))


def test_an_extra_that_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(zero_order, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optimizer 'cma' needs the package cma: pip install 'difftune\[cma\]'"):
        optimizer_named("cma")
    with pytest.raises(ValueError, match="candidates is 3: it must be at least 4"):
        zero_order.CMA(3)


def test_what_is_not_finite_ranks_last():
    values = torch.tensor([1.0, float("nan"), -2.0, float("inf")])
    assert ranked(values).tolist() == [1.0, -2.0, -2.0, -2.0]
    assert torch.equal(ranked(values[:1]), values[:1])


# ------------------------------------------------------------------------------------------------ names and defaults


@pytest.mark.parametrize(("dimension", "rate"), [(SIZE, 5.0), (65_536, 10.0), (256, 0.625)])
def test_learning_rate_follows_the_noises_norm(dimension, rate):
    assert learning_rate(dimension) == rate


def test_an_optimizer_is_named_with_its_options():
    assert optimizer_named("adam[learning_rate=0.1, beta1=0.5]") == Adam(0.1, 0.5)
    assert optimizer_named("sgd", learning_rate=2.0, grad_clip=1.0) == SGD(2.0, 0.9, 1.0)
    assert optimizer_named(Adam(0.3), grad_clip=1.0) == Adam(0.3, grad_clip=1.0)
    assert sized(SGD(), None, SIZE) == SGD(5.0) and sized(SGD(), PAPER["hyper-sdxl"], 4) == SGD(10.0)
    assert sized(Adam(), PAPER["hyper-sdxl"], 4) == Adam() and sized(SGD(1.0), None, 4) == SGD(1.0)
    for spec, more, what in (
        ("sgdd", {}, "did you mean 'sgd'"),
        ("sgd[momentun=0.5]", {}, "did you mean 'momentum'"),
        ("neighbours", {"learning_rate": 1.0}, "no option of optimizer 'neighbours' 'learning_rate'"),
        ("spsa[candidates=3]", {}, "candidates is 3: .*pairs"),
    ):
        with pytest.raises(ValueError, match=what):
            optimizer_named(spec, **more)


def test_levels_at_given_timesteps_are_the_schedulers_and_end_in_data():
    scheduler = pipelines.ddim()
    first, last = levels_at(scheduler, (800,))
    assert first.alpha.item() ** 2 == pytest.approx(scheduler.alphas_cumprod[800].item(), rel=1e-6)
    assert (last.alpha.item(), last.sigma.item()) == (1.0, 0.0)
