"""Each style of truncation against its loop written out, and against the others where they must agree."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from solvers.denoiser import Path, Prediction, predicted
from solvers.noise import cosine, flow, grid, vp
from solvers.rollout.modes import rollout
from solvers.rollout.truncated import STYLES, parse_mask, parse_truncation
from solvers.samplers.catalogue import SAMPLERS, euler, sample

LEVELS = grid(cosine, 5, 0.95, 0.0)
ALL_STEPS = [style for style in STYLES if style not in ("draft_lv", "refl")]  # those that end where sample() ends


class Net(nn.Module):
    """A small conditioned flow network, and its own `Predict`."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 2)).double()
        self.cond = randn(3, 2, seed=2).requires_grad_()
        self.graded = []

    @property
    def tensors(self):
        return [self.cond, *self.parameters()]

    def forward(self, path, at):
        self.graded.append(torch.is_grad_enabled())
        tau = (at.sigma / (at.alpha + at.sigma)).to(path.x).expand(len(path.x), 1)
        return predicted("flow", path.x, at, self.body(torch.cat([path.x, self.cond, tau], 1)))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(path):
    return (path.x**3).mean() + path.x0.square().mean()


def gradients(gradient, name="euler", levels=LEVELS):
    """(of x, of the condition and the parameters, the path, the network)."""
    net, x = Net(), randn(3, 2).requires_grad_()
    path = rollout(SAMPLERS[name], net, x, levels, gradient, randn(len(levels) - 1, 3, 2, seed=1))
    for_x, *others = torch.autograd.grad(loss_of(path), [x, *net.tensors], allow_unused=True)
    return for_x, others, path, net


def close(ours, theirs):
    assert all(g.abs().max() > 0 for g in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_alignprop_trains_as_draft_does(name, kept):
    none, draft, *_ = gradients(f"truncated:{kept}:draft", name)
    for_x, alignprop, *_ = gradients(f"truncated:{kept}:alignprop", name)
    close(alignprop, draft)
    assert none is None and for_x.abs().max() > 0


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
@pytest.mark.parametrize("levels", [LEVELS, grid(flow, 5)])
def test_alignprop_leaves_the_linear_path(levels, kept):
    """prod alpha'/alpha of the steps without network, and sigma'/sigma from alpha = 0, times the rest's gradient; on a
    flow, whose velocity is held, 1."""
    for_x, *_ = gradients(f"truncated:{kept}:alignprop", levels=levels)
    head, tail = levels[: 6 - kept], levels[5 - kept :]
    straight = levels is not LEVELS
    factors = [1.0 if straight else b.alpha / a.alpha if a.alpha else b.sigma / a.sigma for a, b in pairwise(head)]
    net, path = Net(), Path(randn(3, 2))
    with torch.no_grad():
        *_, path = (path, *sample(euler, net, path, head))
    x = path.x.requires_grad_()
    if kept:
        (exact,) = torch.autograd.grad(loss_of(rollout(euler, net, x, tail, "full")), x)
    else:  # x0 of the last step moves as x itself does
        (exact,) = torch.autograd.grad((x**3).mean() + x.square().mean(), x)
    torch.testing.assert_close(for_x, prod(factors) * exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("style", ALL_STEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_run_is_the_samplers(name, style):
    _, _, path, _ = gradients(f"truncated:2:{style}", name)
    end = Path(randn(3, 2))
    with torch.no_grad():
        for noise, (now, then) in zip(randn(5, 3, 2, seed=1), pairwise(LEVELS), strict=True):
            end = SAMPLERS[name](Net(), end, now, then, noise)
    torch.testing.assert_close((path.x, path.x0), (end.x, end.x0), rtol=0, atol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_style_trains_every_sampler_from_pure_noise(name, style):
    _, others, path, _ = gradients(f"truncated:2:{style}", name, grid(flow, 4))
    assert path.x.requires_grad and path.x.isfinite().all()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in others)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draft_is_what_no_style_means(name):
    _, plain, *_ = gradients("truncated:2", name)
    _, named, *_ = gradients("truncated:2:draft", name)
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))


def test_golden_drtune():
    """eps = w x on research's toy chain, the network's input cut off at every step."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Toy:
        tensors = (w,)

        def __call__(self, path, at):
            return predicted("eps", path.x, at, w * path.x)

    levels = [vp(power) for power in (0.1, 0.3, 0.6, 0.9, 1.0)]
    x0 = rollout(euler, Toy(), torch.ones(1, 1, dtype=torch.float64), levels, "truncated:4:drtune").x
    (-((x0 - 2) ** 2).sum() / 2).backward()
    assert w.grad.item() == pytest.approx(-2.4205155268, abs=1e-9)


@pytest.mark.parametrize("kept, trained", [(5, {0, 1, 2, 3, 4}), (2, {2, 4}), (1, {4}), (0, set())])
def test_drtune_cuts_the_input_and_trains_evenly_spaced_steps(kept, trained):
    for_x, others, *_ = gradients(f"truncated:{kept}:drtune")
    net, start = Net(), randn(3, 2).requires_grad_()
    x = start
    for i, (now, then) in enumerate(pairwise(LEVELS)):
        eps = net(Path(x.detach()), now).eps
        eps = eps if i in trained else eps.detach()
        x0 = (x - now.sigma * eps) / now.alpha
        x = then.alpha * x0 + then.sigma * eps
    exact, *theirs = torch.autograd.grad(loss_of(Path(x, x0)), [start, *net.tensors], allow_unused=True)
    torch.testing.assert_close(for_x, exact, rtol=1e-11, atol=0)
    assert [g is None for g in others] == [g is None for g in theirs] == [not kept] * 5
    if kept:
        torch.testing.assert_close(others, theirs, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc_2"])
def test_untrained_steps_run_without_a_graph(name):
    *_, net = gradients("truncated:1:alignprop", name)
    assert not any(net.graded[:4]) and net.graded[-1]
    *_, net = gradients("truncated:1:drtune", name)
    assert not any(net.graded[:4]) and net.graded[-1]


def test_refl_is_one_call_and_its_x0():
    for kept in (1, 3):
        _, ours, path, mine = gradients(f"truncated:{kept}:refl")
        net, end = Net(), Path(randn(3, 2))
        with torch.no_grad():
            *_, end = sample(euler, net, end, LEVELS[: 6 - kept])
        x0 = net(end, LEVELS[5 - kept]).x0
        torch.testing.assert_close((path.x, path.x0), (x0, x0))
        close(ours, torch.autograd.grad(loss_of(Path(x0, x0)), net.tensors))
        assert len(mine.graded) == 5 - kept + 2  # the graded call, and once more on the way back
        short = [*LEVELS[:-1], vp(0.999)]  # as DDIM's with set_alpha_to_one=False
        assert torch.equal(gradients(f"truncated:{kept}:refl", levels=short)[2].x, path.x)
    _, draft, *_ = gradients("truncated:1:draft")
    _, refl, *_ = gradients("truncated:1:refl")
    assert all(torch.equal(a, b) for a, b in zip(draft, refl, strict=True))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ancestral"])
def test_draft_lv_averages_noised_ends(name):
    torch.manual_seed(5)
    _, ours, path, _ = gradients("truncated:3:draft_lv", name)
    assert path[:3].x.shape == path[3:6].x.shape == path[6:].x.shape == (3, 2)
    assert not torch.equal(path[:3].x, path[3:6].x)
    net, end, noises = Net(), Path(randn(3, 2)), randn(5, 3, 2, seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for noise, (now, then) in zip(noises, pairwise(LEVELS), strict=True):
            before, end = end, SAMPLERS[name](net, end, now, then, noise)
    now, then = LEVELS[-2:]
    total = 0
    for _ in range(3):
        again = Path(now.alpha * end.x + now.sigma * torch.randn_like(end.x), None, before.memory)
        total = total + loss_of(SAMPLERS[name](net, again, now, then, noises[-1])) / 3
    close(ours, torch.autograd.grad(total, net.tensors))


def test_draft_lv_has_less_variance():
    """The gradient's variance over the noise of the last step: about a quarter with four copies."""

    def spread(copies):
        torch.manual_seed(0)
        found, net = [], Net()
        for _ in range(24):
            path = rollout(euler, net, randn(3, 2), LEVELS, f"truncated:{copies}:draft_lv")
            found.append(torch.autograd.grad(loss_of(path), net.body[2].weight)[0].flatten())
        return torch.stack(found).var(0).sum()

    assert spread(4) < spread(1) / 2


def test_the_shift_is_cut_off_too():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Shifted(Net):
        @property
        def tensors(self):
            return [*super().tensors, scale]

        def forward(self, path, at):
            return super().forward(path, at)._replace(shift=scale * path.x)

    net, x = Shifted(), randn(3, 2).requires_grad_()
    path = rollout(euler, net, x, LEVELS, "truncated:0:alignprop")
    for_x, for_scale = torch.autograd.grad(path.x.sum(), [x, scale], allow_unused=True)
    assert for_scale is None
    torch.testing.assert_close(for_x, torch.full_like(x, (1 / LEVELS[0].alpha).item()))


def test_strings():
    assert parse_truncation("10", 25) == (10, "draft")
    assert parse_truncation("10:refl", 25) == (10, "refl")
    assert parse_truncation("4:draft_lv", 1) == (4, "draft_lv")  # copies of the last step, not steps
    for option, said in {
        "2:draaft": "no truncation style 'draaft'.*draft, alignprop, draft_lv, refl, drtune",
        "2:draft:1": "no truncation style 'draft:1'",
        "6:drtune": "0 to 5",
        "0:refl": "1 to 5",
        "0:draft_lv": "1 to 5",
        ":refl": "1 to 5.*styles?: draft",
        "two": "0 to 5",
    }.items():
        with pytest.raises(ValueError, match=said):
            rollout(euler, Net(), randn(3, 2), LEVELS, f"truncated:{option}")


def test_x_alone_is_not_cut_off_in_silence():
    x = randn(3, 2).requires_grad_()
    predict = Net().requires_grad_(False)
    predict.cond = predict.cond.detach()
    for style in ("draft", "refl", "draft_lv"):
        with pytest.raises(ValueError, match="only x requires grad.*alignprop"):
            rollout(euler, predict, x, LEVELS, f"truncated:2:{style}")
    for gradient in ("truncated:5", "truncated:2:alignprop", "truncated:2:drtune"):
        assert rollout(euler, predict, x, LEVELS, gradient).x.requires_grad


def test_a_prediction_may_be_of_any_kind():
    """Linear relies on x = alpha x0 + sigma eps alone: here of a network of eps, at every style."""

    class Eps(Net):
        def forward(self, path, at):
            p = super().forward(path, at)
            return Prediction((path.x - at.sigma * p.eps) / at.alpha, p.eps)

    for style in ALL_STEPS:
        nets = Net(), Eps()
        ends = [rollout(euler, net, randn(3, 2), LEVELS, f"truncated:2:{style}") for net in nets]
        grads = [torch.autograd.grad(loss_of(e), n.tensors) for e, n in zip(ends, nets, strict=True)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)


KEPT = {"1000": -0.9763091627, "0100": -0.6264483048, "0010": -0.4847883848, "0001": -0.3329696745}
KEPT |= {"1010": -1.2784024530, "1001": -1.1549108045, "1111": -1.7078450145, "0011": -0.7411062854}


@pytest.mark.parametrize("mask", KEPT)
def test_golden_toy_masked(mask):
    """The latent path stays alive at the steps that are dropped."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Toy:
        tensors = (w,)

        def __call__(self, path, at):
            return predicted("eps", path.x, at, w * path.x)

    levels = [vp(power) for power in (0.1, 0.3, 0.6, 0.9, 1.0)]
    x0 = rollout(euler, Toy(), torch.ones(1, 1, dtype=torch.float64), levels, f"truncated:{mask}:mask").x
    (-((x0 - 2) ** 2).sum() / 2).backward()
    assert w.grad.item() == pytest.approx(KEPT[mask], rel=1e-9)


@pytest.mark.parametrize("mask", ["011", "01101", "01a1", "2011", ""])
def test_a_mask_has_a_digit_for_each_step(mask):
    with pytest.raises(ValueError, match="4 digits, 1 for a step that carries gradient"):
        parse_mask(f"{mask}:mask", 4)
