"""Branches at another point: in our own loop, inside every family's pipeline, and where they make no sense."""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from guidance.attach.handle import attach
from guidance.contract import Branch, Guided
from guidance.guided import guided
from guidance.methods.catalogue import CFGMP
from solvers.denoiser import Path
from solvers.families import table
from solvers.levels import levels_of
from solvers.noise import Noise, cosine, flow, grid
from solvers.samplers.catalogue import SAMPLERS, euler, sample
from tests.guidance.attach.test_registry import controlled
from tests.guidance.attach.test_registry import run as call
from tests.guidance.methods.test_conformance import FAMILY, SCHEDULERS, STEPS, close, pipe_of, run
from tests.support.dits import DPM
from tests.support.toy import CONDS, B, Toy, labels, start

ONE_STEP = ("DDIM", "flow Euler", "flow Euler by size")


@dataclass(frozen=True)
class Ahead:
    """The prediction at the end of the step that the one here would make; `here`: at the point itself."""

    here: bool = False
    rows: Tensor | None = None
    space: str = "flow"
    seen: list[Noise | None] = field(default_factory=list)

    def guide(self, path: Path, at: Noise):
        preds = yield {"cond": Branch("cond")}
        self.seen.append(path.then)
        x, then = path.x, path.then
        if self.here or then is None:
            then = at
        else:
            x = then.alpha * preds.to("cond", "x0") + then.sigma * preds.to("cond", "eps")
        preds = yield {"ahead": Branch("cond", self.rows, x=x, at=then)}
        return Guided(preds["ahead"] if self.rows is None else preds["cond"])


# ------------------------------------------------------------------------------------------------ our own loop
@pytest.mark.parametrize("schedule", (flow, cosine))
def test_a_step_ahead_by_hand(schedule):
    """x' by Euler along u(x_p, then), x_p = alpha' x0 + sigma' eps; each point is converted at its own level."""
    toy, now, then = Toy(), schedule(0.7), schedule(0.4)
    predict = guided(toy, Ahead(), CONDS)
    p = toy(start().x, now, CONDS["cond"])
    q = toy(then.alpha * p.x0 + then.sigma * p.eps, then, CONDS["cond"])
    direction = (q.eps - q.x0, now.alpha + now.sigma)
    x0 = (start().x - now.sigma * direction[0]) / direction[1]
    close(euler(predict, start(), now, then).x0, x0, 1e-12)
    assert predict.nfe == 2 * B and predict.branches == {"cond": B, "ahead": B} and predict.counter.calls == 2


def test_the_same_point_is_the_same_branch():
    for at in (flow(0.4), cosine(0.6)):
        there = guided(Toy(), Ahead(here=True), CONDS)(start(), at)
        plain = Toy()(start().x, at, CONDS["cond"])
        assert torch.equal(there.x0, guided(Toy(), Ahead(here=True, rows=torch.ones(B).bool()), CONDS)(start(), at).x0)
        close(there.x0, plain.x0, 1e-12)


def test_skipped_rows_are_skipped():
    some = torch.tensor([True, False, False, True])
    predict = guided(Toy(), Ahead(rows=some), CONDS)
    predict(start(), flow(0.5))
    assert predict.branches == {"cond": B, "ahead": 2}


@dataclass(frozen=True)
class Levels:
    """Three branches at two other levels."""

    space = "flow"

    def guide(self, path, at):
        low = {"x": path.x, "at": flow(0.2)}
        preds = yield {
            "a": Branch("cond", **low),
            "b": Branch("uncond", **low),
            "c": Branch("cond"),
            "d": Branch("uncond"),
        }
        return Guided(preds["c"] + preds["a"] - preds["b"])


def test_one_call_has_one_level():
    predict = guided(Toy(), Levels(), CONDS)
    said = predict(start(), flow(0.6))
    assert predict.counter.calls == 2 and predict.nfe == 4 * B
    a, b, c = (
        p.eps - p.x0
        for p in (
            Toy()(start().x, flow(0.2), CONDS["cond"]),
            Toy()(start().x, flow(0.2), CONDS["uncond"]),
            Toy()(start().x, flow(0.6), CONDS["cond"]),
        )
    )
    close(said.eps - said.x0, c + a - b, 1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_eulers_method_tells_where_its_step_ends(name):
    method, levels = Ahead(), grid(flow, 3)
    list(sample(SAMPLERS[name], guided(Toy(), method, CONDS), start(), levels, torch.Generator().manual_seed(0)))
    ends = [then for then in method.seen if then is not None]
    assert ends == (levels[1:] if name == "euler" else [])


@dataclass(frozen=True)
class Wrong:
    """Asks for a point that is none."""

    branch: Branch
    space: str = "flow"

    def guide(self, path, at):
        preds = yield {"cond": Branch("cond"), "there": self.branch}
        return Guided(preds["cond"])


X = start().x


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Wrong(Branch("cond", x=X)), "Wrong asks for a branch with x alone: give both, x and at"),
        (Wrong(Branch("cond", at=flow(0.3))), "Wrong asks for a branch with at alone"),
        (Wrong(Branch("cond", x=X, at=flow(0.3)), "any"), 'another point, so its result .* give it space = "flow"'),
    ],
)
def test_half_a_point_and_a_method_without_a_space_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        guided(Toy(), method, CONDS)(start(), flow(0.5))


def test_a_gradient_goes_through_both_points():
    x = start(seed=3).x.requires_grad_()
    levels = grid(flow, 2, start=0.9)
    for step in range(2):
        predict = guided(Toy(), Ahead(), {"cond": labels(0, 1, 2, 0)})
        (gradient,) = torch.autograd.grad(euler(predict, Path(x), *levels[step : step + 2]).x.sum(), x)
        h = 1e-6 * torch.ones_like(x)
        up, down = (euler(predict, Path(x.detach() + s * h), *levels[step : step + 2]).x.sum() for s in (1, -1))
        assert abs(float((up - down) / 2e-6 - gradient.sum())) < 1e-6 * (1 + float(gradient.sum().abs()))


# ------------------------------------------------------------------------------------------------ pipelines
def times_heard(pipe):
    """The times that the network is told, call by call, while the pipeline is not stock."""
    network = pipe.components[table.family_of(pipe).denoisers[0]]
    forward, heard = network.forward, []

    def spy(*args, **kwargs):
        heard.append(float(torch.as_tensor(kwargs["t" if "t" in kwargs else "timestep"]).flatten()[0]))
        return forward(*args, **kwargs)

    network.forward = spy
    return heard, lambda: vars(network).pop("forward")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind, case", [pair for pair in FAMILY if pair[1] in ONE_STEP])
def test_the_next_level_is_told_as_the_next_step_tells_it(kind, case):
    """Each look ahead tells the network the very time of the next step, in the family's own unit."""
    pipe = pipe_of(kind, case)
    heard, undo = times_heard(pipe)
    try:
        with attach(pipe, Ahead()) as handle:
            run(kind, pipe)
    finally:
        undo()
    assert len(heard) == 2 * STEPS and handle.branches == {"cond": 2 * STEPS, "ahead": 2 * STEPS}
    torch.testing.assert_close(heard[1:-1:2], heard[2::2], rtol=1e-5, atol=1e-5)
    ends = {"zimage": 1.0, "lumina2": 1.0}.get(kind, 0.0)
    assert abs(heard[-1] - ends) < 1e-6 or kind in ("sd", "sdxl", "pixart-sigma")  # DDIM ends at its first timestep


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind, case", FAMILY)
def test_the_same_point_in_a_pipeline(kind, case):
    """A branch at the point itself is the plain one: to the bit where latents are not rescaled for the network."""
    pipe = pipe_of(kind, case)
    with attach(pipe, Ahead(here=True)) as handle:
        ours = run(kind, pipe)
    with attach(pipe, Wrong(Branch("cond"), "any")):
        plain = run(kind, pipe)
    close(ours, plain)
    assert handle.nfe == 4 * STEPS


def test_a_scheduler_with_a_history_does_not_tell_where_the_step_ends():
    pipe, method = pipe_of("sd", "DPM++ 2M"), Ahead()
    with attach(pipe, method):
        run("sd", pipe)
    assert method.seen == [None] * STEPS


def test_first_order_dpm_is_eulers_method():
    pipe, method = pipe_of("sd3", "flow DPM++ 2M"), Ahead()
    pipe.scheduler = DPMSolverMultistepScheduler(**DPM, solver_order=1)
    with attach(pipe, method):
        run("sd3", pipe)
    levels = levels_of(pipe.scheduler)[1:]
    assert [float(then.sigma) for then in method.seen] == pytest.approx([float(at.sigma) for at in levels], abs=1e-6)


def test_a_controlnet_looks_ahead_too():
    pipe, heard = controlled(), []
    original = pipe.controlnet.forward

    def spy(*args, **kwargs):
        heard.append((float(kwargs["timestep"]), kwargs["sample"]))
        return original(*args, **kwargs)

    pipe.controlnet.forward = spy
    with attach(pipe, Ahead()):
        call(pipe, prompt="red", image=torch.rand(1, 3, 16, 16))
    times = [time for time, _ in heard]
    assert times[1] == times[2] < times[0] and not torch.equal(heard[0][1], heard[1][1])


# ------------------------------------------------------------------------------------------------ what steps allow
@pytest.mark.parametrize(
    ("case", "scheduler", "call", "message"),
    [
        ("sd", {"clip_sample": True}, {}, "CFGMP moves the latents, and .* DDIMScheduler clips; set clip_sample=False"),
        ("sd", {"thresholding": True}, {}, "carries the move DDIMScheduler clips; set .* thresholding=False"),
        ("sd", {}, {"eta": 0.5}, "CFGMP moves the latents, which a step with noise undoes: .* eta=0"),
        ("sd3", {"stochastic_sampling": True}, {}, "CFGMP looks ahead .* FlowMatchEuler.* without stochastic_sampling"),
    ],
)
def test_a_step_that_would_lose_the_move_is_refused(case, scheduler, call, message):
    name = "DDIM" if case == "sd" else "flow Euler"
    pipe = pipe_of(case, name)
    pipe.scheduler = SCHEDULERS[name](**scheduler)
    with attach(pipe, CFGMP()), pytest.raises(ValueError, match=message):
        run(case, pipe, **call)
