"""Optimal checkpointing: the counts of the closed form, and the gradient of `full`."""

import weakref
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import pytest
import torch

from solvers.denoiser import Path, pack
from solvers.noise import cosine, grid, log_snr
from solvers.rollout.modes import rollout
from solvers.rollout.revolve import Replay, milestones, repeated
from solvers.rollout.run import Run
from solvers.rollout.sweep import Totals
from solvers.samplers.catalogue import SAMPLERS, euler
from tests.support.sweeps import MEANS, Net, loss_of, mixture, randn, rel, vp

LEVELS = grid(cosine, 5, 0.95, 0.0)


@cache
def least(steps, slots):
    """The dynamic programme that the closed form solves."""
    if steps == 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + least(steps - m, slots - 1) + least(m, slots) for m in range(1, steps))


@dataclass(frozen=True)
class Counted(Replay):
    """A chain whose state is its step's index, which counts its steps and the states that are alive."""

    plain: list = field(default_factory=list)
    taped: list = field(default_factory=list)
    alive: list = field(default_factory=list)
    most: list = field(default_factory=list)

    def _step(self, path, i):
        assert path.x == i
        self.plain.append(i)
        then = Path(path.x + 1)
        self.alive.append(weakref.ref(then.x))
        return then

    def _pull(self, path, i, cotangents, totals, note):
        assert path.x == i
        self.taped.append(i)
        self.alive[:] = [ref for ref in self.alive if ref() is not None]
        self.most.append(len(self.alive))
        return cotangents


def counted(steps, slots):
    run = Run(euler, mixture(), torch.zeros(()), [(None, None, None)] * steps)
    replay = Counted(run, slots)
    down = replay.down(run.x, check=False)._replace(ends=())
    stored = len(down.note.states)
    replay.up(down, [None], Totals([]))
    return replay, stored


@pytest.mark.parametrize("slots", range(1, 10))
def test_counts_are_the_closed_form(slots):
    for steps in range(1, 61):
        assert repeated(steps, slots) == least(steps, slots)
        replay, stored = counted(steps, slots)
        assert replay.taped == list(range(steps))[::-1]
        assert len(replay.plain) == repeated(steps, slots) + 1
        assert stored <= slots + (slots < steps)  # and the one that the last step starts from


@pytest.mark.parametrize(("steps", "slots"), [(50, 1), (50, 3), (50, 8), (20, 5), (60, 9)])
def test_no_more_states_are_alive_than_slots(steps, slots):
    """Beside the one that the graph is built from; the initial state is the caller's."""
    replay, _ = counted(steps, slots)
    assert max(replay.most) <= slots


@pytest.mark.parametrize(
    ("steps", "slots", "total"), [(50, 1, 1275), (50, 3, 230), (50, 8, 145), (20, 2, 85), (1000, 5, 7284)]
)
def test_totals_of_the_sheet(steps, slots, total):
    assert repeated(steps, slots) + steps == total


def test_first_split_positions_are_minimisers():
    assert milestones(50, 1) == [0] and milestones(3, 9) == [0, 1, 2]


def gradients(name, gradient, **net):
    torch.manual_seed(0)
    x, cond = randn(3, 2, seed=2).requires_grad_(), randn(3, 2, seed=3).requires_grad_()
    noise, net = randn(len(LEVELS) - 1, 3, 2, seed=4).requires_grad_(), Net(cond, **net)
    torch.manual_seed(0)
    path = rollout(SAMPLERS[name], net, x, LEVELS, gradient, noise)
    loss = (path.x**3).sum() + path.x0.square().sum() + sum(v.square().sum() for v in path.memory.values())
    after = torch.randn(2)
    return loss, torch.autograd.grad(loss, [x, noise, *net.tensors], allow_unused=True), net, after


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.sampled(3)
def test_gradient_is_that_of_full(name, slots, dropout):
    """For x, noise, condition and parameters, with history and with dropout, whose masks come back."""
    loss, full, _, after = gradients(name, "full", dropout=dropout)
    other, again, _, then = gradients(name, f"revolve:{slots}", dropout=dropout)
    assert torch.equal(loss, other) and torch.equal(after, then)
    for a, b in zip(full, again, strict=True):
        assert (a is None and (b is None or not b.any())) or rel(b, a) <= 1e-12


def test_the_recursion_of_two_steps_by_hand():
    """T3, of DPM-Solver++(2M): w_i = B_i (1 + k_i) a_{i+1} - B_{i+1} k_{i+1} a_{i+2}, a_i = A_i a_{i+1} + J_i^T w_i."""
    levels, means, x = vp(9), MEANS.clone().requires_grad_(), randn(6, 2).requires_grad_()
    path = rollout(SAMPLERS["dpmpp_2m"], mixture(means), x, levels, "revolve:3")
    ours = torch.autograd.grad(loss_of(path.x), (x, means))
    predict, n = mixture(means), len(levels) - 1
    h = [log_snr(then) - log_snr(now) for now, then in pairwise(levels)]
    a = [then.sigma / now.sigma for now, then in pairwise(levels)]
    b = [then.alpha - now.alpha * k for k, (now, then) in zip(a, pairwise(levels), strict=True)]
    k = [0.0, *(ahead / (2 * before) for before, ahead in pairwise(h))]
    states, said = [x.detach()], []
    for i in range(n):
        at = states[-1].requires_grad_()
        said.append(predict(Path(at), levels[i]).x0)
        states.append((a[i] * at + b[i] * ((1 + k[i]) * said[i] - k[i] * said[i - 1])).detach())
    assert rel(states[-1], path.x.detach()) <= 1e-12
    end = states[-1].requires_grad_()
    later, beyond, total = torch.autograd.grad(loss_of(end), end)[0], None, torch.zeros_like(means)
    for i in reversed(range(n)):
        w = b[i] * (1 + k[i]) * later - (0 if beyond is None else b[i + 1] * k[i + 1] * beyond)
        pull, own = torch.autograd.grad(said[i], (states[i], means), w)
        later, beyond, total = a[i] * later + pull, later, total + own
    assert rel(ours[0], later) <= 1e-12 and rel(ours[1], total) <= 1e-12


def test_eulers_gradient_is_bit_for_bit_that_of_full():
    full, again = gradients("euler", "full")[1], gradients("euler", "revolve:3")[1]
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True) if a is not None)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_network_calls(slots):
    *_, net, _ = gradients("euler", f"revolve:{slots}")
    assert net.calls == repeated(5, slots) + 1 + 5


class Kept:
    """What autograd has saved, for as long as it keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved(gradient, steps):
    """Bytes that autograd and our function hold between the run and its backward pass."""
    kept, net = weakref.WeakSet(), Net(randn(3, 2, seed=3).requires_grad_())
    keep = lambda t: kept.add(one := Kept(t)) or one  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        path = rollout(euler, net, randn(3, 2).requires_grad_(), grid(cosine, steps, 0.95), gradient)
    states = [] if gradient == "full" else path.x.grad_fn.note.states
    return sum(one.tensor.nbytes for one in kept) + sum(t.nbytes for _, state in states for t in pack(state)[0])


def test_stored_bytes_stay_within_the_slots():
    latent = 3 * 2 * 8
    for slots in (1, 3, 8):
        assert saved(f"revolve:{slots}", 20) <= latent + (slots + 1) * 2 * latent  # a state is x and x0
        assert saved(f"revolve:{slots}", 40) == saved(f"revolve:{slots}", 20)
    assert saved("full", 40) > 1.8 * saved("full", 20) > 100 * latent


def test_a_second_backward_pass_starts_from_x():
    x, cond = randn(3, 2).requires_grad_(), randn(3, 2, seed=3).requires_grad_()
    path = rollout(euler, Net(cond, dropout=0.2), x, LEVELS, "revolve:3")
    first = torch.autograd.grad(path.x.sum(), (x, cond), retain_graph=True)
    again = torch.autograd.grad(path.x.sum(), (x, cond))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bad_slots_are_named():
    for option in ("", ":0", ":-1", ":x"):
        with pytest.raises(ValueError, match="1 or more, as in 'revolve:8'"):
            rollout(euler, mixture(), randn(3, 2), LEVELS, f"revolve{option}")
    with pytest.raises(ValueError, match="needs a step, such as solvers.samplers.catalogue.euler"):
        rollout(None, mixture(), randn(3, 2), LEVELS, "revolve:2")
