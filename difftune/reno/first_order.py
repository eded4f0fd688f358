"""Optimisers that move a noise by its gradient: a step for a batch of samples, each of which is optimised by itself.

    step(z, loss, gradient, memory) -> (z, memory),     z and gradient (B, D), loss (B,), memory batch-first.

`FIRST_ORDER` is the list; `difftune.reno.zero_order` has those that need no gradient. An update is a pure function of
what it is given, so that a run can be saved between any two of them, and a sample that is finished can be left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solvers.ranges import Count, Decay, NotNegative, Positive, Ranged, Share

Memory = Mapping[str, Tensor]  # each (B, ...)


class FirstOrder(Protocol):
    """An optimiser that is told a gradient."""

    def start(self, z: Tensor) -> Memory: ...
    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...


@dataclass(frozen=True)
class SGD(Ranged):
    """SGD with Nesterov momentum on the clipped gradient, as ReNO's own (https://arxiv.org/abs/2406.04312).

    v <- momentum v + g,  z <- z - learning_rate (g + momentum v). With a clip c, no update is longer than
    learning_rate c / (1 - momentum), and the first is learning_rate c (1 + momentum) at most.
    """

    learning_rate: NotNegative | None = None  # None: 5 sqrt(D / 16384), the paper's 5 at its D
    momentum: Decay = 0.9
    grad_clip: Positive | None = 0.1  # of a sample's gradient norm; None: no clip

    def start(self, z: Tensor) -> Memory:
        return {"velocity": torch.zeros_like(z)}

    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        g = clipped(gradient, self.grad_clip)
        velocity = self.momentum * memory["velocity"] + g
        return z - rate(self.learning_rate) * (g + self.momentum * velocity), {"velocity": velocity}


@dataclass(frozen=True)
class Adam(Ranged):
    """Adam (https://arxiv.org/abs/1412.6980): a step is about learning_rate in each element, whatever D is.

    The reference code of ReNO has it with epsilon 0.01, which after its clip makes SGD of it; the defaults here are
    Adam's own, without a clip.
    """

    learning_rate: NotNegative = 0.05
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8
    grad_clip: Positive | None = None

    def start(self, z: Tensor) -> Memory:
        return {"mean": torch.zeros_like(z), "square": torch.zeros_like(z), "steps": torch.zeros(len(z)).to(z)}

    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        g, steps = clipped(gradient, self.grad_clip), memory["steps"] + 1
        mean = self.beta1 * memory["mean"] + (1 - self.beta1) * g
        square = self.beta2 * memory["square"] + (1 - self.beta2) * g**2
        ahead = mean / (1 - self.beta1**steps)[:, None]
        width = (square / (1 - self.beta2**steps)[:, None]).sqrt() + self.epsilon
        return z - self.learning_rate * ahead / width, {"mean": mean, "square": square, "steps": steps}


@dataclass(frozen=True)
class LBFGS(Ranged):
    """L-BFGS (Nocedal & Wright, algorithms 7.4 and 3.1): one evaluation an iteration, each sample at its own pace.

    The direction is the two-loop recursion over the last `history` pairs; the first is the gradient's, `first_step`
    long. A point that does not lower the loss by `decrease` of what the slope promised is abandoned: the next one lies
    half as far from the point before (backtracking), and no pair is made of it. A pair without curvature is not kept.
    """

    learning_rate: NotNegative = 1.0  # of the direction, before backtracking
    history: Count = 10
    first_step: Positive = 1.0  # length
    max_step: Positive = 10.0  # length of any step
    decrease: Share = 1e-4  # Armijo's constant

    def start(self, z: Tensor) -> Memory:
        pairs = z.new_zeros(len(z), self.history, z.shape[1])
        scalar = z.new_zeros(len(z), dtype=torch.float64)
        none = {"z": z, "gradient": torch.zeros_like(z), "direction": torch.zeros_like(z)}
        return {
            **none,
            "s": pairs,
            "y": pairs,
            "loss": scalar + torch.inf,
            "length": scalar,
            "slope": scalar,
        }

    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        bound = memory["loss"] + self.decrease * memory["length"] * memory["slope"]
        accepted = ~(loss.double() > bound)
        taken = self._from_here(z, loss, gradient, memory)
        back = {**memory, "length": memory["length"] / 2}
        chosen = {key: _where(accepted, taken[key], back[key]) for key in back}
        return chosen["z"] + (chosen["length"][:, None] * chosen["direction"]).to(z), chosen

    def _from_here(self, z: Tensor, loss: Tensor, gradient: Tensor, memory: Memory) -> dict[str, Tensor]:
        """The memory with this point in it, and the direction that leads on."""
        first = memory["loss"].isinf()
        s, y = z - memory["z"], gradient - memory["gradient"]
        curved = ~first & ((s * y).sum(dim=1) > 1e-10 * y.square().sum(dim=1))
        pairs_s = _where(curved, _pushed(memory["s"], s), memory["s"])
        pairs_y = _where(curved, _pushed(memory["y"], y), memory["y"])
        direction = -_two_loops(gradient, pairs_s, pairs_y)
        norm = direction.norm(dim=1)
        length = torch.where(first, self.first_step / norm, self.learning_rate * (self.max_step / norm).clamp(max=1))
        return {
            "z": z,
            "gradient": gradient,
            "direction": direction,
            "s": pairs_s,
            "y": pairs_y,
            "loss": loss.double(),
            "length": length.double().nan_to_num(0.0, 0.0, 0.0),
            "slope": (gradient * direction).sum(dim=1).double(),
        }


def _two_loops(gradient: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """H g of the pairs s, y (B, m, D), the newest last; pairs of zeros count for nothing."""
    product = (s * y).sum(dim=2)
    rho = torch.where(product > 0, 1 / product, 0)
    q, alphas = gradient, []
    for i in reversed(range(s.shape[1])):
        alpha = (rho[:, i] * (s[:, i] * q).sum(dim=1))[:, None]
        q = q - alpha * y[:, i]
        alphas.append(alpha)
    newest = product[:, -1] / y[:, -1].square().sum(dim=1)
    r = torch.where(product[:, -1] > 0, newest, 1)[:, None] * q
    for i, alpha in enumerate(reversed(alphas)):
        r = r + s[:, i] * (alpha - (rho[:, i] * (y[:, i] * r).sum(dim=1))[:, None])
    return r


def _pushed(pairs: Tensor, new: Tensor) -> Tensor:
    return torch.cat([pairs[:, 1:], new[:, None]], dim=1)


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where a sample is chosen, b elsewhere."""
    return torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b)


def clipped(gradient: Tensor, limit: float | None) -> Tensor:
    """Each sample's gradient (B, D), scaled to a norm of at most `limit`, as torch's clip_grad_norm_ does for one."""
    if limit is None:
        return gradient
    return gradient * (limit / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)


def rate(learning_rate: float | None) -> float:
    assert learning_rate is not None, "the rule for the size was not applied"
    return learning_rate


FIRST_ORDER: dict[str, type] = {"sgd": SGD, "adam": Adam, "lbfgs": LBFGS}
