"""Surrogate gradients: the sheet's toy in float64, their identities, and what cannot be."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from solvers.denoiser import Path, predicted
from solvers.noise import cosine, flow, grid
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import euler
from tests.solvers.rollout.test_truncated import Net, loss_of, randn

LEVELS = [flow(t) for t in (1, 0.75, 0.5, 0.25, 0)]


class Toy:
    """v = w x (1 + t), w = .5."""

    def __init__(self):
        self.w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        self.tensors = (self.w,)

    def __call__(self, path, at):
        return predicted("flow", path.x, at, self.w * path.x * (1 + at.sigma))


def slope(gradient: str, reward=lambda x: -((x - 2) ** 2).sum() / 2) -> float:
    """d/dw of the reward of the end, whose start is 1."""
    toy = Toy()
    x = rollout(euler, toy, torch.ones(1, 1, dtype=torch.float64), LEVELS, gradient).x
    reward(x).backward()
    return toy.w.grad.item()


GOLDENS = {
    "checkpoint": -1.3216513731,
    "truncated:1": -0.2377860364,
    "truncated:2": -0.5341040203,
    "truncated:3": -0.8936365074,
    "truncated:0001:held": -0.2377860364,
    "truncated:1000:held": -0.7991561890,
    "truncated:1001:held": -1.0369422254,
    "truncated:0101:held": -0.7622322855,
    "truncated:1111:held": -1.9125801590,
    "truncated:0101,1.5:held": -1.1433484282,
    "truncated:4:drtune": -1.9125801590,
    "truncated:1011,1,2,0:bridge": -1.3881339100,
    "truncated:1011,1,2,0.1:bridge": -1.3731497315,
    "truncated:1011,1,2,0.5:bridge": -1.3132130173,
    "truncated:1011,1,2,1:bridge": -1.2382921246,
    "truncated:1111,1,2,0:bridge": -1.9125801590,
    "truncated:1111,1,2,1:bridge": -1.6644047019,
    "truncated:0,2,0:leap": -2.3006957471,
    "truncated:0,2,0.3:leap": -2.1208856046,
    "truncated:0,2,1:leap": -1.7013286054,
    "truncated:1,3,0:leap": -1.2866785345,
    "truncated:1,3,0.3:leap": -1.2375116986,
    "truncated:1,3,1:leap": -1.1227890817,
    "truncated:2,3,1:leap": -0.5341040203,  # adjacent last steps: DRaFT-2
    "truncated:2,3:direct": -0.5515941705,
    "truncated:3,2:direct": 0.5944015803,
    "truncated:3,2,-1:direct": -0.5944015803,
}


@pytest.mark.parametrize("gradient", GOLDENS)
def test_goldens(gradient):
    assert slope(gradient) == pytest.approx(GOLDENS[gradient], abs=2e-10)


def test_a_leaps_gradient_is_divided_by_how_far_it_is_from_the_run():
    """d_j = .0859375 and d_0 = .0354766846, and at least TAU each."""
    for tau in (1e-9, 0.05, 0.2):
        width = max(0.0859375, tau) + max(0.0354766846, tau)
        assert slope(f"truncated:0,2,0.3,{tau}:leap") == pytest.approx(-2.1208856046 / width, rel=1e-7)


@pytest.mark.parametrize(("option", "found"), [("2,3", 0.4259141286), ("3,2", 0.2748019695)])
def test_direct_align_judges_the_image_that_is_found_again(option, found):
    x = rollout(euler, Toy(), torch.ones(1, 1, dtype=torch.float64), LEVELS, f"truncated:{option}:direct").x
    assert x.item() == pytest.approx(found, abs=1e-10)


@pytest.mark.parametrize(
    "style", ["01010:held", "01010,1.5:held", "01011,1,3,0.5:bridge", "1,3,0.3:leap", "0,4,1,0.1:leap"]
)
@pytest.mark.parametrize("schedule", [flow, cosine])
def test_the_end_is_the_runs_own_to_the_bit_and_a_constant_reward_has_no_gradient(style, schedule):
    levels, net = grid(schedule, 5, 0.98, 0.0), Net()
    with torch.no_grad():
        plain = rollout(euler, net, randn(3, 2), levels, "full")
    path = rollout(euler, net, randn(3, 2), levels, f"truncated:{style}")
    assert torch.equal(path.x, plain.x) and path.x.requires_grad
    grads = torch.autograd.grad((0 * path.x).sum() + 0.7, net.tensors, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("schedule", [flow, cosine])
def test_held_steps_are_additive_scale_and_equal_drtune_and_a_bridge_without_its_jacobian(schedule):
    levels = grid(schedule, 5, 0.98, 0.0)

    def gradient(mode: str) -> torch.Tensor:
        net = Net()
        end = rollout(euler, net, randn(3, 2), levels, mode)
        return torch.cat([g.flatten() for g in torch.autograd.grad(end.x.sum(), net.tensors)])

    parts = [gradient(f"truncated:{mask}:held") for mask in ("01000", "00010", "00001")]
    whole = gradient("truncated:01011:held")
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(gradient("truncated:01011,2.5:held"), 2.5 * whole)
    torch.testing.assert_close(gradient("truncated:01011,1,3,0:bridge"), whole)
    torch.testing.assert_close(gradient("truncated:11111:held"), gradient("truncated:5:drtune"))
    assert not torch.allclose(gradient("truncated:01011,1,3,1:bridge"), whole)


def test_each_points_up_the_exact_gradient():
    """They are biased, and of the exact gradient's direction; a vector toy near a Gaussian's flow."""
    levels = grid(flow, 8)

    def gradient(mode: str) -> torch.Tensor:
        shift = torch.zeros(6, dtype=torch.float64, requires_grad=True)

        class Shifted:
            tensors = (shift,)

            def __call__(self, path, at):
                power = (1 - at.sigma) ** 2 * 0.25 + at.sigma**2
                gap = path.x - (1 - at.sigma) * shift
                return predicted("flow", path.x, at, (at.sigma - (1 - at.sigma) * 0.25) / power * gap - shift)

        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        end = rollout(euler, Shifted(), x, levels, mode).x
        return torch.autograd.grad(-((end - 1) ** 2).sum(), shift)[0]

    exact = gradient("checkpoint")
    for mode in ("01010101,1.5:held", "01010101,1,3,0.5:bridge", "2,5,0.3:leap", "0,6,0.3,0.1:leap", "4,5:direct"):
        assert torch.cosine_similarity(exact, gradient(f"truncated:{mode}"), 0) > 0.9, mode


def test_biases_on_a_gaussian():
    """For N(mu, .25) and 25 steps, d end / d mu is 1: what each surrogate makes of it, as the docs say."""

    def gradient(mode: str) -> float:
        mu = torch.zeros(1, dtype=torch.float64, requires_grad=True)

        class Moved:
            tensors = (mu,)

            def __call__(self, path, at):
                t, power = at.sigma, (1 - at.sigma) ** 2 * 0.25 + at.sigma**2
                return predicted("flow", path.x, at, (t - (1 - t) * 0.25) / power * (path.x - (1 - t) * mu) - mu)

        end = rollout(euler, Moved(), torch.zeros(1, 1, dtype=torch.float64), grid(flow, 25), mode).x
        return torch.autograd.grad(end.sum(), mu)[0].item()

    assert gradient("checkpoint") == pytest.approx(1, abs=0.02)
    assert gradient(f"truncated:{'1' * 25}:held") == pytest.approx(1.202, abs=2e-3)
    assert gradient("truncated:1") == pytest.approx(0.007, abs=1e-3)
    pairs = [(k, j) for k in range(0, 24, 3) for j in range(k + 1, 25, 2)]  # of 300 pairs, whose mean is .875
    leaps = sum(gradient(f"truncated:{k},{j},0.3:leap") for k, j in pairs) / len(pairs)
    assert leaps == pytest.approx(0.875, abs=0.03)


@pytest.mark.parametrize("mode", ["11111:held", "01011:held", "01011,1,3,0.5:bridge", "1,3,0.3:leap", "2,3:direct"])
def test_what_carries_gradient_is_recomputed_one_call_at_a_time(mode):
    net = Net()
    end = rollout(euler, net, randn(3, 2), grid(flow, 5), f"truncated:{mode}")
    assert all(g is not None for g in torch.autograd.grad(loss_of(end), net.tensors))


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("011:held", "wants 4 digits"),
        ("0211:held", "wants 4 digits"),
        ("0110,x:held", "is written MASK"),
        ("0110,1,2:held", "is written MASK"),
        ("0110,1,3,0.5:bridge", "joins at step 3, which its mask does not train"),
        ("0110,1,9,0.5:bridge", "joins at step 9"),
        ("2,1,0.3:leap", "wants two steps, 0 <= K < J < 4"),
        ("0,4,0.3:leap", "wants two steps"),
        ("0,1:leap", "is written K,J"),
        ("0,2,0.3,0:leap", "give it above 0"),
        ("0,1:direct", "wants two levels of 1 to 3"),
        ("2,2:direct", "wants two levels"),
        ("3,4:direct", "wants two levels"),
        ("3,2,--1:direct", "is written I,J"),
        ("-3,2:direct", "wants two levels"),
    ],
)
def test_what_cannot_be_is_one_sentence(option, what):
    with pytest.raises(ValueError, match=what) as error:
        rollout(euler, Toy(), torch.ones(1, 1, dtype=torch.float64), LEVELS, f"truncated:{option}")
    assert "\n" not in str(error.value)


def test_x_gets_the_gradient_around_the_network():
    """1 on a flow, whose velocity is held."""
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    end = rollout(euler, Toy(), x, LEVELS, "truncated:0101:held")
    assert torch.autograd.grad(end.x.sum(), x)[0].item() == 1 and isinstance(end, Path)


@dataclass
class Line:
    """A denoiser whose raw output is w x."""

    prediction_type: str
    w: torch.Tensor

    def __call__(self, x, at, cond):
        return predicted(self.prediction_type, x, at, self.w * x)

    def patched(self, name):
        raise NotImplementedError


@dataclass
class Asked:
    """`Predict` of a denoiser in a container, as a guided prediction holds its networks."""

    networks: dict

    @property
    def tensors(self):
        return [self.networks["main"].w]

    def __call__(self, path, at):
        return self.networks["main"](path.x, at, {})


def by_hand(space: str, w: torch.Tensor, levels) -> torch.Tensor:
    """DDIM's steps around the network's own output, whose input is cut off."""
    x = torch.ones(1, 1, dtype=torch.float64)
    for now, then in itertools.pairwise(levels):
        out = w * x.detach()
        x0 = now.alpha * x - now.sigma * out if space == "v" else (x - now.sigma * out) / now.alpha
        eps = now.sigma * x + now.alpha * out if space == "v" else out
        x = then.alpha * x0 + then.sigma * eps
    return x.sum()


@pytest.mark.parametrize("space", ["v", "eps"])
def test_a_network_that_predicts_v_has_its_v_held(space):
    levels, start = grid(cosine, 6, 0.98, 0.02), torch.ones(1, 1, dtype=torch.float64)
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(by_hand(space, w, levels), w)
    end = rollout(euler, Asked({"main": Line(space, w)}), start, levels, "truncated:6:drtune").x
    torch.testing.assert_close(torch.autograd.grad(end.sum(), w)[0], wanted)
    assert end.item() == pytest.approx(by_hand(space, w, levels).item())
