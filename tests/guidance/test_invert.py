"""Inversion: the algebraic inverse of a step, reconstruction, editing, and null-text inversion."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guidance.guided import guided
from guidance.invert import NullText, ddim_inversion, edit, invert, null_text_inversion
from guidance.methods.catalogue import CFG, CFGpp, Plain
from solvers.denoiser import Path, Prediction, predicted
from solvers.noise import Noise, cosine, flow, grid
from solvers.samplers.catalogue import euler, sample
from tests.support.toy import CONDS, MEANS, Toy, predict, start


@dataclass
class Fixed:
    """A network whose raw output depends on the condition alone."""

    prediction_type: str = "eps"

    def __call__(self, x: Tensor, at: Noise, cond) -> Prediction:
        return predicted(self.prediction_type, x, at, cond["out"].expand_as(x))


def outputs() -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return {name: {"out": torch.randn(2, 5, generator=g, dtype=torch.float64)} for name in ("cond", "uncond")}


@pytest.mark.parametrize("method", (CFGpp(0.6), CFG(3.0), Plain()), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("space", "schedule"), (("eps", cosine), ("flow", flow)))
def test_inversion_is_the_algebraic_inverse_of_the_step(method, space, schedule):
    """With the outputs held fixed, a step up and a step down are the identity, to rounding."""
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for now, then in pairwise(grid(schedule, 5, start=0.9, stop=0.1)[::-1]):
        net = guided(Fixed(space), method, outputs())
        up = ddim_inversion(net, Path(x), now, then, space=space)
        torch.testing.assert_close(euler(net, up, then, now).x, x, rtol=1e-12, atol=1e-12)


def test_cfgpp_inversion_swaps_the_roles():
    """x0 by eps_u, noise by eps_l: the equation of the paper."""
    at, then = cosine(0.3), cosine(0.6)
    x, conds = torch.ones(2, 5, dtype=torch.float64), outputs()
    c, u = conds["cond"]["out"], conds["uncond"]["out"]
    up = ddim_inversion(guided(Fixed(), CFGpp(0.4), conds), Path(x), at, then)
    expected = then.alpha * (x - at.sigma * u) / at.alpha + then.sigma * (u + 0.4 * (c - u))
    torch.testing.assert_close(up.x, expected)


@pytest.mark.parametrize("schedule", (flow, cosine))
def test_more_steps_reconstruct_better(schedule):
    latents = start(seed=5).x
    errors = []
    for steps in (10, 40):
        levels = grid(schedule, steps, start=0.98)
        found = edit(Toy("flow" if schedule is flow else "eps"), CFGpp(0.1), latents, CONDS, CONDS, levels)
        errors.append(float((found - latents).norm() / latents.norm()))
    assert errors[1] < errors[0] / 2 and errors[1] < 0.25, errors


def test_edit_moves_towards_the_target():
    levels = grid(cosine, 30, start=0.98)
    source = {"cond": CONDS["cond"], "uncond": CONDS["uncond"]}
    target = {**source, "cond": CONDS["negative"]}
    latents = start(seed=5).x * 0.7
    kept, moved = (edit(Toy("eps"), CFGpp(0.2), latents, source, t, levels) for t in (source, target))
    to_target = MEANS[2] - MEANS[CONDS["cond"]["label"]]
    assert ((moved - kept) * to_target)[:3].flatten(1).sum(1).gt(0.1).all()


def test_inverted_path_starts_a_new_run():
    assert not invert(predict(CFGpp(0.3)), start().x, grid(cosine, 4, start=0.9)).memory


# ------------------------------------------------------------------------------------------------ null-text inversion
class Affine(nn.Module):
    """eps = A x + hidden, with hidden the mean over the tokens of an embedding (B, L, D)."""

    prediction_type = "eps"

    def forward(self, x: Tensor, at: Noise, cond) -> Prediction:
        return predicted("eps", x, at, 0.3 * x + cond["encoder_hidden_states"].mean(1))


def texts() -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    hidden = {name: torch.randn(2, 3, 6, generator=g, dtype=torch.float64) for name in ("cond", "uncond")}
    return {name: {"encoder_hidden_states": value} for name, value in hidden.items()}


LEVELS = grid(cosine, 6, start=0.9, stop=0.02)
LATENTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def end(method, path: Path, conds) -> Tensor:
    with torch.no_grad():
        *_, last = sample(euler, guided(Affine(), method, conds), path, LEVELS)
    return last.x


def test_null_text_reconstructs():
    """The toy's loss can reach zero, since the embedding moves eps anywhere: so it does, where plain CFG misses."""
    conds = texts()
    options = NullText(scale=3.0, iterations=120, lr=0.1, tolerance=0.0)
    method, noisy = null_text_inversion(Affine(), LATENTS, conds, LEVELS, options)
    assert method.nulls.shape == (6, 2, 3, 6) and method.scale == 3.0
    ours = (end(method, noisy, conds) - LATENTS).norm()
    plain = (end(CFG(3.0), noisy, conds) - LATENTS).norm()
    assert ours < 0.05 * plain, (ours, plain)


def test_null_text_at_scale_one_changes_nothing():
    """At w = 1 the prediction does not depend on the embedding: no gradient, no change."""
    conds = texts()
    method, _ = null_text_inversion(Affine(), LATENTS, conds, LEVELS, NullText(scale=1.0))
    torch.testing.assert_close(method.nulls, conds["uncond"]["encoder_hidden_states"].expand(6, -1, -1, -1))


def test_null_text_without_iterations_is_cfg():
    conds = texts()
    method, noisy = null_text_inversion(Affine(), LATENTS, conds, LEVELS, NullText(scale=2.0, iterations=0))
    torch.testing.assert_close(end(method, noisy, conds), end(CFG(2.0), noisy, conds))


def test_null_text_is_for_its_own_levels():
    method, noisy = null_text_inversion(Affine(), LATENTS, texts(), LEVELS, NullText(iterations=0))
    with pytest.raises(ValueError, match="NullTextInversion was made for 6 noise levels, and k = .* is none of them"):
        guided(Affine(), method, texts())(noisy, cosine(0.5))
    with pytest.raises(ValueError, match="has no embeddings: make it by guidance.invert"):
        guided(Affine(), replace(method, nulls=None), texts())(noisy, LEVELS[0])


def seen_by_adam(monkeypatch, steps: int, tolerance: float = 0.0, losses=None) -> list[tuple[float, int]]:
    """(learning rate, iterations) of each step's fit."""
    fits: list[tuple[float, int]] = []
    stock = torch.optim.Adam

    class Watched(stock):
        def __init__(self, params, lr):
            fits.append((lr, 0))
            super().__init__(params, lr=lr)

        def step(self, *args):
            fits[-1] = (fits[-1][0], fits[-1][1] + 1)
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    if losses is not None:
        monkeypatch.setattr(F, "mse_loss", lambda a, b: (a - b).square().mean() * 0 + losses(len(fits) - 1))
    levels = grid(cosine, steps, start=0.9, stop=0.02)
    null_text_inversion(Affine(), LATENTS, texts(), levels, NullText(iterations=2, tolerance=tolerance))
    return fits


@pytest.mark.parametrize("steps", (1, 2, 3, 100, 250))
def test_null_text_learns_at_any_number_of_steps(monkeypatch, steps):
    """The rate falls from `lr` to about half of it, and is the paper's lr (1 - i / 100) at its 50 steps."""
    rates = [rate for rate, _ in seen_by_adam(monkeypatch, steps)]
    assert rates[0] == 1e-2 and len(rates) == steps
    assert rates == sorted(rates, reverse=True) and rates[-1] >= 5e-3


def test_null_text_is_the_papers_at_its_50_steps(monkeypatch):
    """lr (1 - i / 100), and done at a loss below 1e-5 + 2e-5 i."""
    below = [iterations for _, iterations in seen_by_adam(monkeypatch, 50, 1e-5, lambda i: 1e-5 + 2e-5 * i - 1e-9)]
    above = seen_by_adam(monkeypatch, 50, 1e-5, lambda i: 1e-5 + 2e-5 * i + 1e-9)
    assert below == [1] * 50 and [iterations for _, iterations in above] == [2] * 50
    torch.testing.assert_close([rate for rate, _ in above], [1e-2 * (1 - i / 100) for i in range(50)])
