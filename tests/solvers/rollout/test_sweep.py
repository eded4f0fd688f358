"""What all explicit sweeps share: one node of autograd, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch

from difftune.models import load
from difftune.pipelines import lora
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from solvers.denoiser import Path, Prediction, predicted
from solvers.exact import Gaussian, bind
from solvers.latent import LatentModel
from solvers.noise import cosine, grid
from solvers.rollout.lean import WithBase, lean_sweep
from solvers.rollout.modes import MODES, rollout, unchecked_gradients, watch_gradients
from solvers.rollout.reversible import reversible_sampler
from solvers.rollout.sweep import Totals
from solvers.samplers.catalogue import ancestral, dpmpp_2m, euler
from tests.support import pipelines
from tests.support.sweeps import Net, mixture, randn, rel

LEVELS = grid(cosine, 5, 0.95, 0.0)
OWN = [
    *(f"adjoint:{name}" for name in ("euler", "midpoint", "heun", "rk4", "deis-1", "deis-2m", "exact_endpoint")),
    *(f"reversible:{name}" for name in ("bdia", "alf", "belm", "reversible-heun", "mccallum-foster:midpoint", "edict")),
    "lean",
]
SWEEPS = ["revolve:2", *OWN]
TO_THE_LAST = [mode for mode in OWN if mode.startswith(("adjoint", "reversible:reversible", "reversible:mccallum"))]
TO_THE_LAST.remove("adjoint:exact_endpoint")  # the others call the network at the last level
STEPPED = ["full", "checkpoint", "revolve:2", "truncated:5"]
NO_MEMORY = [mode for mode in OWN if mode not in ("adjoint:exact_endpoint", "lean")]


def run(mode, predict, x, levels=LEVELS, step=None, noise=None):
    """A rollout with what the mode needs."""
    step = (step or euler) if mode in STEPPED else None
    noise = randn(len(levels) - 1, *x.shape, seed=9).to(x.dtype) if mode == "lean" else noise
    return rollout(step, predict, x, levels, mode, noise)


@pytest.mark.parametrize("mode", SWEEPS)
def test_gradients_reach_what_x_and_conditions_are_made_from(mode):
    seed, words = randn(3, 2, seed=2).requires_grad_(), randn(3, 2, seed=3).requires_grad_()

    def gradients(x, cond, *leaves):
        net = Net(cond)
        return torch.autograd.grad((run(mode, net, x).x ** 3).sum(), [*leaves, *net.parameters()])

    leaves = [t.detach().requires_grad_() for t in (seed.sin(), words.tanh() * 2)]
    for_x, for_cond, *direct = gradients(*leaves, *leaves)
    for_seed, for_words, *upstream = gradients(seed.sin(), words.tanh() * 2, seed, words)
    assert rel(for_seed, for_x * seed.cos()) <= 1e-14
    assert rel(for_words, for_cond * 2 * (1 - words.tanh() ** 2)) <= 1e-14
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(direct, upstream, strict=True))


@pytest.mark.parametrize("mode", SWEEPS)
def test_state_is_float32_at_least_and_forward_needs_no_graph(mode):
    net = Net(randn(3, 2, seed=3).float(), torch.float32)
    x = randn(3, 2).half()
    with torch.no_grad():
        free = run(mode, net, x).x
    end = run(mode, net, x.requires_grad_()).x
    assert end.dtype == torch.float32 and torch.equal(free, end) and not free.requires_grad
    end.sum().backward()
    assert x.grad.dtype == torch.float16 and x.grad.abs().max() > 0


def test_sums_are_float32_at_least():
    """A hundred gradients of 1/128 of the sum are lost in bfloat16."""
    totals = Totals([torch.zeros((), dtype=torch.bfloat16)])
    totals.add([torch.tensor(256.0, dtype=torch.bfloat16)])
    for _ in range(256):
        totals.add([torch.tensor(0.5, dtype=torch.bfloat16)])
    assert totals.cast()[0].item() == 384 and totals.cast()[0].dtype == torch.bfloat16


def cast(mode, forward, backward, **options):
    """Gradients for x and the weights, each way under autocast or not."""
    net, x = Net(randn(3, 2, seed=3).float(), torch.float32), randn(3, 2).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=forward, **options):
        loss = (run(mode, net, x).x ** 2).sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=backward, **options):
        return torch.autograd.grad(loss, [x, *net.parameters()])


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("mode", ["revolve:2", "reversible:alf", "adjoint:heun"])
def test_both_ways_run_in_the_precision_of_the_run(mode, forward):
    """Whatever is set around the backward pass."""
    ways = ((forward, forward), (forward, not forward), (not forward, forward))
    same, other, across = (cast(mode, *way) for way in ways)
    assert all(torch.equal(a, b) for a, b in zip(same, other, strict=True))
    assert not torch.equal(same[0], across[0])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["revolve:2", "adjoint:exact_endpoint"])
def test_weights_under_autocast_get_the_gradient_of_full(mode, backward):
    """A weight that was cast without a graph must not serve where one is wanted."""
    full = cast("full", True, backward, cache_enabled=False)
    for a, b in zip(cast(mode, True, backward), full, strict=True):
        assert b.abs().max() > 0 and rel(a, b) <= 1e-6


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_tensor_that_is_listed_twice_counts_once(mode):
    def gradient(times):
        mean = torch.tensor([0.3, -0.2]).double().requires_grad_()
        end = run(mode, bind(Gaussian(mean, 0.5), {}, [mean] * times), randn(3, 2)).x
        return torch.autograd.grad(end.sum(), mean)[0]

    assert torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_tensor_listed_beside_what_it_is_made_from_is_refused(mode):
    word = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mean = word * 2 + 1
    with pytest.raises(ValueError, match=r"\(2,\) beside one that it is made from.*'checkpoint'"):
        run(mode, bind(Gaussian(mean, 0.5), {}, [mean, word]), randn(3, 2))


@pytest.mark.parametrize("mode", SWEEPS)
def test_an_unlisted_leaf_is_named(mode):
    hidden = torch.ones(7, 2, dtype=torch.float64, requires_grad=True)
    predict = bind(Gaussian(hidden.mean(0), 0.5), {})
    with pytest.raises(ValueError, match=r"\(7, 2\).*predict.tensors"):
        run(mode, predict, randn(3, 2))
    with torch.no_grad():
        run(mode, predict, randn(3, 2))


@pytest.mark.parametrize("mode", SWEEPS)
def test_no_second_derivative(mode):
    x = randn(3, 2).requires_grad_()
    end = run(mode, mixture(), x).x
    with pytest.raises(RuntimeError, match="no second derivative: use gradient='full' or 'checkpoint'"):
        torch.autograd.grad(end.sum(), x, create_graph=True)


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_parameter_changed_before_the_backward_pass_is_an_error(mode):
    net = Net(randn(3, 2, seed=3))
    end = run(mode, net, randn(3, 2)).x
    with torch.no_grad():
        net.body[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"\(16, 5\) was changed in place.*before the optimizer's step"):
        end.sum().backward()


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_condition_or_noise_written_in_place_is_an_error(mode):
    """Though it needs no gradient: the network, or the step, is called with it again."""
    net, noise = Net(randn(3, 2, seed=3)), randn(5, 3, 2, seed=9)
    changes = [net.cond] if mode != "lean" else [net.cond, noise]
    for changed in changes:
        step, drawn = (euler, None) if mode == "revolve:2" else (None, noise if mode == "lean" else None)
        end = rollout(step, net, randn(3, 2), LEVELS, mode, drawn).x
        changed += 1
        with pytest.raises(ValueError, match=r"predict.tensors, or noise, was written in place.*backward\(\) first"):
            end.sum().backward()


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_generator_inside_is_refused(mode):
    generator = torch.Generator().manual_seed(0)

    class Augmented(Net):
        def forward(self, path, at):
            return super().forward(Path(path.x + torch.randn(path.x.shape, generator=generator).to(path.x)), at)

    with pytest.raises(ValueError, match="torch.Generator is used inside the step.*draw before the run"):
        run(mode, Augmented(randn(3, 2)), randn(3, 2))


@pytest.mark.parametrize("mode", SWEEPS)
def test_nothing_that_requires_grad_is_an_error(mode):
    frozen = Net(randn(3, 2)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing .* requires grad.*requires_grad_\(\).*no_grad"):
        run(mode, frozen, randn(3, 2))
    with torch.no_grad():
        assert not run(mode, frozen, randn(3, 2)).x.requires_grad


@pytest.mark.parametrize(
    ("mode", "calls"),
    [("adjoint:euler", (5, 10)), ("adjoint:midpoint", (10, 20)), ("adjoint:heun", (10, 20)), ("adjoint:rk4", (20, 40))]
    + [(f"adjoint:{name}", (5, 10)) for name in ("deis-1", "deis-2m", "exact_endpoint")]
    + [("lean", (5, 10))],
)
def test_network_calls(mode, calls):
    """The calls of five steps: forward, and with the backward pass."""
    net = Net(randn(3, 2, seed=3))
    end = run(mode, net, randn(3, 2)).x
    forward = net.calls
    end.sum().backward()
    assert (forward, net.calls) == calls


class Broken(Net):
    """A network whose gradient is not finite near one level."""

    def forward(self, path, at):
        said = super().forward(path, at)
        if torch.is_grad_enabled() and 0.5 < at.sigma / (at.alpha + at.sigma) < 0.62:
            return said._replace(eps=said.eps + (0 * path.x).sqrt())
        return said


@pytest.mark.parametrize("mode", ["checkpoint", "revolve:2", "adjoint:exact_endpoint", "lean", "reversible:bdia"])
def test_a_gradient_that_is_not_finite_names_its_step(mode):
    levels = grid(cosine, 6, 0.95)
    broken = [i for i, at in enumerate(levels) if 0.5 < at.sigma / (at.alpha + at.sigma) < 0.62]
    assert broken == [2]
    end = watched(mode, Broken(randn(3, 2, seed=3)), randn(3, 2).requires_grad_(), levels, lambda *_: None).x
    with pytest.raises(FloatingPointError, match=rf"not finite at step {broken[0]} of 6"):
        end.sum().backward()


@pytest.mark.parametrize("mode", SWEEPS)
def test_clean_data_gives_a_network_of_x0_no_eps(mode):
    """At sigma = 0: refused where the network is called there."""
    weight, x = randn(2, 2, seed=3).requires_grad_(), randn(3, 2).requires_grad_()
    predict = lambda path, at: predicted("x0", path.x, at, (path.x @ weight).tanh())  # noqa: E731
    predict.tensors = (weight,)
    end = run(mode, predict, x).x
    if mode in TO_THE_LAST:
        with pytest.raises(FloatingPointError, match="the gradient is not finite at step 4 of 5"):
            end.sum().backward()
    else:
        assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(end.sum(), (x, weight)))


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_scaled_loss_has_the_gradient_times_the_scale(mode):
    """To the last bit in float32, as a sweep is linear: what a loss scaler divides by is what it multiplied with."""

    def gradients(scale):
        x, net = randn(3, 2).float().requires_grad_(), Net(randn(3, 2, seed=3).float().requires_grad_(), torch.float32)
        loss = (run(mode, net, x).x ** 3).sum()
        return torch.autograd.grad(scale * loss, [x, *net.tensors])

    for scaled, plain in zip(gradients(2.0**14), gradients(1.0), strict=True):
        assert plain.any() and torch.equal(scaled, 2.0**14 * plain)


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_loss_scaler_finds_its_scale_by_overflowing(mode):
    """From a scale that overflows float32 it backs off until nothing overflows; its gradient is then the plain one."""
    net = Net(randn(3, 2, seed=3).float(), torch.float32)
    x, weights = randn(3, 2).float(), list(net.parameters())
    exact = torch.autograd.grad((run(mode, net, x).x ** 3).sum(), weights)
    scaler, optimizer = torch.amp.GradScaler("cpu", 2.0**127), torch.optim.SGD(weights, 0.0)
    scales = []
    for _ in range(60):
        with unchecked_gradients():
            scaler.scale((run(mode, net, x).x ** 3).sum()).backward()
        scaler.unscale_(optimizer)
        found = [weight.grad for weight in weights]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        if all(gradient.isfinite().all() for gradient in found):
            break
    assert 2.0**100 < scales[-1] < 2.0**127 and len(scales) > 1
    assert all(rel(a, b) <= 1e-6 for a, b in zip(found, exact, strict=True))


def watched(mode, net, x, levels, on_step):
    with watch_gradients(on_step):
        return run(mode, net, x, levels)


@pytest.mark.parametrize("mode", [*STEPPED, *OWN])
def test_watched_norms(mode):
    """Last step first; index 0 is x_T, and the exact modes of one sampler agree at every index."""

    def norms(mode):
        seen, x = {}, randn(3, 2).requires_grad_()
        end = watched(mode, Net(randn(3, 2, seed=3)), x, LEVELS, seen.__setitem__).x
        (gradient,) = torch.autograd.grad((end**3).sum(), x)
        return seen, gradient.norm().item()

    seen, norm = norms(mode)
    assert list(seen) == [4, 3, 2, 1, 0]
    assert mode.startswith("reversible") or seen[0] == pytest.approx(norm, rel=1e-6)
    if mode in STEPPED or mode == "adjoint:exact_endpoint":
        assert seen == pytest.approx(norms("full")[0], rel=1e-6)


def test_watching_ends_with_its_block():
    seen, x = [], randn(3, 2).requires_grad_()
    for mode in ("checkpoint", "revolve:2"):
        watched(mode, mixture(), x, LEVELS, lambda *step: seen.append(step)).x.sum().backward()
        count = len(seen)
        run(mode, mixture(), x).x.sum().backward()
        x.sum().backward()
        assert len(seen) == count > 0


@dataclass(frozen=True)
class Momentum:
    """Guidance that carries a running mean of x0, or CFG++'s shift."""

    net: Net
    shift: bool = False

    @property
    def tensors(self):
        return self.net.tensors

    def __call__(self, path, at):
        said = self.net(path, at)
        if self.shift:
            return said._replace(shift=0.1 * said.x0)
        mean = 0.5 * said.x0 + 0.5 * path.memory.get("toy.mean", said.x0)
        return Prediction(said.x0 + 0.3 * mean, said.eps - 0.3 * at.alpha / at.sigma * mean, None, {"toy.mean": mean})


@pytest.mark.parametrize("mode", NO_MEMORY)
def test_guidance_with_memory_is_refused_by_name(mode):
    for shift, name in ((False, "toy.mean"), (True, r"shift \(CFG\+\+\)")):
        predict = Momentum(Net(randn(3, 2, seed=3)), shift)
        with pytest.raises(ValueError, match=rf"carries {name} from step to step.*{mode}.*'checkpoint' or 'revolve:8'"):
            run(mode, predict, randn(3, 2))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("mode", "step"), [("revolve:2", dpmpp_2m), ("adjoint:exact_endpoint", euler), ("lean", ancestral)]
)
def test_guidance_with_memory_is_carried(mode, step, shift):
    """As `full` carries it."""

    def gradients(mode):
        x, cond = randn(3, 2).requires_grad_(), randn(3, 2, seed=3).requires_grad_()
        noise = randn(5, 3, 2, seed=9) if step is ancestral else None
        predict = Momentum(Net(cond), shift)
        path = run(mode, predict, x, step=step, noise=noise)
        return torch.autograd.grad((path.x**3).sum(), [x, *predict.tensors])

    assert all(rel(a, b) <= 1e-12 for a, b in zip(gradients(mode), gradients("full"), strict=True))


@pytest.mark.parametrize("mode", NO_MEMORY)
def test_a_network_that_draws_is_refused(mode):
    with pytest.raises(ValueError, match=r"draws random numbers \(dropout\?\).*call eval\(\)"):
        run(mode, Net(randn(3, 2), dropout=0.5), randn(3, 2))
    run(mode, Net(randn(3, 2), dropout=0.5).eval(), randn(3, 2))


@pytest.mark.parametrize("mode", OWN)
def test_what_a_mode_with_its_own_solver_refuses(mode):
    x = randn(3, 2)
    with pytest.raises(ValueError, match=f"'{mode}' brings its own solver: pass step=None"):
        rollout(euler, mixture(), x, LEVELS, mode, randn(5, 3, 2))
    with pytest.raises(ValueError, match=f"'{mode}' needs two levels"):
        rollout(None, mixture(), x, LEVELS[:1], mode)
    if mode != "lean":
        with pytest.raises(ValueError, match=f"'{mode}' is deterministic.*leave the noise out"):
            rollout(None, mixture(), x, LEVELS, mode, randn(5, 3, 2))


@pytest.mark.parametrize("mode", STEPPED)
def test_other_modes_need_a_step(mode):
    with pytest.raises(ValueError, match="needs a step, such as solvers.samplers.catalogue.euler"):
        rollout(None, mixture(), randn(3, 2), LEVELS, mode)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="no adjoint method 'dopri5'; known: euler, midpoint, heun, rk4, deis-1"):
        rollout(None, mixture(), randn(3, 2), LEVELS, "adjoint:dopri5")
    with pytest.raises(ValueError, match=f"known: {', '.join(MODES)}"):
        rollout(None, mixture(), randn(3, 2), LEVELS, "adjoin:euler")
    with pytest.raises(ValueError, match="'lean' takes no option"):
        rollout(None, mixture(), randn(3, 2), LEVELS, "lean:3")
    with pytest.raises(ValueError, match="'lean' samples with eta = 1: pass 5 noise tensors"):
        rollout(None, mixture(), randn(3, 2), LEVELS, "lean")


# ------------------------------------------------------------------------------------------------ lean


def test_lean_without_a_base_is_the_gradient_of_its_sampler():
    """With the trained model as its own base, the sweep is exact."""
    noise = randn(5, 3, 2, seed=9)

    def gradients(predict_of, step, mode):
        x, net = randn(3, 2).requires_grad_(), Net(randn(3, 2, seed=3).requires_grad_())
        end = rollout(step, predict_of(net), x, LEVELS, mode, noise).x
        return torch.autograd.grad((end**3).sum(), [x, *net.tensors])

    full = gradients(lambda net: net, ancestral, "full")
    for predict_of in (lambda net: net, lambda net: WithBase(net, net)):
        assert all(rel(a, b) <= 1e-12 for a, b in zip(gradients(predict_of, None, "lean"), full, strict=True))


def test_lean_takes_the_bases_jacobians():
    """a_k = (dPhi_base / dx_k)^T a_{k+1} on the trained model's states, and (dPhi / dtheta)^T a_{k+1} of its own."""
    noise, base, x = randn(5, 3, 2, seed=9), mixture(), randn(3, 2).requires_grad_()
    net = Net(randn(3, 2, seed=3).requires_grad_())
    path = rollout(None, WithBase(net, base), x, LEVELS, "lean", noise)
    a_x, *ours = torch.autograd.grad((path.x**3).sum(), [x, *net.tensors])
    states, a = [x.detach()], None
    for now, then, n in zip(LEVELS, LEVELS[1:], noise, strict=False):
        states.append(ancestral(net, Path(states[-1]), now, then, n).x.detach())
    adjoints, hand = [3 * states[-1] ** 2], [torch.zeros_like(t) for t in net.tensors]
    for k in reversed(range(5)):
        at = states[k].clone().requires_grad_()
        trained = ancestral(net, Path(states[k]), LEVELS[k], LEVELS[k + 1], noise[k]).x
        own = torch.autograd.grad(trained, net.tensors, adjoints[-1], allow_unused=True)
        hand = [h + o for h, o in zip(hand, own, strict=True)]
        mean = ancestral(base, Path(at), LEVELS[k], LEVELS[k + 1], torch.zeros(3, 2)).x
        (a,) = torch.autograd.grad(mean, at, adjoints[-1])
        adjoints.append(a)
    assert rel(a_x, a) <= 1e-12
    assert all(rel(o, h) <= 1e-12 for o, h in zip(ours, hand, strict=True))
    swept = lean_sweep(base, states, LEVELS, 3 * states[-1] ** 2)
    assert len(swept) == 6
    assert all(torch.equal(s, h) for s, h in zip(swept, adjoints[::-1], strict=True))


def test_lean_with_a_base_refuses_memory():
    predict = WithBase(Momentum(Net(randn(3, 2))), mixture())
    with pytest.raises(ValueError, match="carries toy.mean.*'lean' cannot with a base"):
        run("lean", predict, randn(3, 2))


# ------------------------------------------------------------------------------------------------ pipelines


def adapted(pipe):
    """A pipeline with an adapter that is not at its zero start: the model, its prediction and the weights."""
    weights = list(lora.add(pipe, rank=2).values())
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    model = LatentModel(pipe)
    with torch.no_grad():
        conds = model.encode(["a red circle"])
    return model, guided(model.denoiser, CFG(3.0), conds), weights


@pytest.fixture(scope="module")
def small():
    return adapted(pipelines.sd())


@pytest.mark.parametrize("mode", ["adjoint:euler", "adjoint:exact_endpoint", "reversible:alf", "lean"])
@pytest.mark.parametrize(("change", "what"), [("disable_adapters", "adapters"), ("train", "train")])
def test_a_network_that_changed_before_backward_is_an_error(small, mode, change, what):
    model, predict, _ = small
    end = run(mode, predict, model.noise(1, torch.Generator().manual_seed(0)), model.levels(2)).x
    getattr(model.network, change)()
    try:
        with pytest.raises(ValueError, match=rf"{what}.*backward\(\) first.*gradient='full'"):
            end.sum().backward()
    finally:
        model.network.enable_adapters()
        model.network.eval()


@pytest.mark.parametrize("option", ["bdia", "alf", "mccallum-foster:midpoint"])
def test_reversible_lora_gradient_is_autograds_through_the_same_sampler(small, option):
    model, predict, weights = small
    x, levels = model.noise(1, torch.Generator().manual_seed(0)), model.levels(4)
    sampler = reversible_sampler(option, predict, levels)
    end = sampler.latent(sampler.down(sampler.start(x)))
    exact = torch.autograd.grad(end.square().mean(), weights)
    ours = torch.autograd.grad(run(f"reversible:{option}", predict, x, levels).x.square().mean(), weights)
    assert all(rel(a, b) <= 1e-3 for a, b in zip(ours, exact, strict=True))


def test_revolve_on_tiny_is_full():
    model, predict, weights = adapted(load("tiny"))
    x, levels = model.noise(1, torch.Generator().manual_seed(0)).requires_grad_(), model.levels(2)
    gradients = lambda mode: torch.autograd.grad(run(mode, predict, x, levels).x.square().mean(), [x, *weights])  # noqa: E731
    assert all(rel(a, b) <= 1e-5 for a, b in zip(gradients("revolve:2"), gradients("full"), strict=True))
