"""The engine on the embedded `tiny` model with a LoRA: exactness, memory, and each trap with its remedy."""

from functools import partial

import diffusers
import pytest
import torch

from difftune import models
from difftune.pipelines import lora
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from solvers.denoiser import Path, predicted
from solvers.latent import LatentModel
from solvers.levels import levels_of
from solvers.memory.checkpointing import block_checkpointing
from solvers.noise import flow, grid
from solvers.rollout.modes import rollout
from solvers.rollout.recompute import Recomputed
from solvers.samplers.catalogue import SAMPLERS, ancestral, euler, gaussian, sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STEPS = 2  # the first without history, the second with it: tiny's schedule ends above sigma = 0
GUIDANCE = CFG(3.0)


@pytest.fixture(scope="module")
def tiny():
    """(model, weights of the LoRA); B is not zero, or A would have no gradient."""
    pipe = models.load("tiny")
    weights = lora.add(pipe, rank=2)
    for i, weight in enumerate(weights.values()):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) / 10
    return LatentModel(pipe), list(weights.values())


@pytest.fixture(scope="module")
def conds(tiny):
    with torch.no_grad():
        return tiny[0].encode(["a red circle left of a blue square"])


def leaf(cond):
    return {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in cond.items()}


def run(tiny, conds, step, gradient, steps=STEPS):
    """(path, what gradients are asked for) from fixed noise."""
    model, weights = tiny
    x = model.noise(1, torch.Generator().manual_seed(0)).requires_grad_()
    own = {name: leaf(cond) for name, cond in conds.items()}
    fresh = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    path = rollout(step, guided(model.denoiser, GUIDANCE, own), x, model.levels(steps), gradient, fresh)
    return path, [x, *(v for cond in own.values() for v in cond.values() if v.requires_grad), *weights]


def gradients(*args, **options):
    path, wanted = run(*args, **options)
    return torch.autograd.grad(path.x.square().mean(), wanted)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.sampled(3)
def test_checkpoint_is_full_bit_for_bit(tiny, conds, name):
    """For the noise, both conditions and every weight of the LoRA."""
    full, again = (gradients(tiny, conds, SAMPLERS[name], gradient) for gradient in ("full", "checkpoint"))
    assert len(full) > 20 and all(torch.equal(a, b) for a, b in zip(full, again, strict=True))
    assert all(g.abs().max() > 0 for g in full)


QUICK = ("heun", "dpmpp_2m", "ancestral")  # a solver of two stages, of two steps, of fresh noise


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SAMPLERS])
def test_block_checkpointing_changes_no_bit(tiny, conds, name):
    network, entered = tiny[0].network, []
    blocks = network.down_blocks[0].resnets
    handles = [block.register_forward_pre_hook(lambda *_: entered.append(1)) for block in blocks]
    plain, once = gradients(tiny, conds, SAMPLERS[name], "full"), len(entered)
    with block_checkpointing(network):
        nested = gradients(tiny, conds, SAMPLERS[name], "checkpoint")
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, nested, strict=True))
    assert len(entered) - once == 3 * once  # forward, the call again, and the block again


def saved(tiny, conds, gradient, steps):
    """Bytes that autograd keeps for backward, each storage once, and not those of the model."""
    kept, known = {}, {p.untyped_storage().data_ptr() for p in tiny[0].network.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        path, _ = run(tiny, conds, euler, gradient, steps)
    return sum(size for size, _ in kept.values()), path.x.nbytes


def test_full_grows_by_a_graph_a_step_and_checkpoint_by_a_state(tiny, conds):
    """A state is the latent and the last clean estimate, which guidance may read; beside it, the level's numbers."""
    grown, one = {}, 0
    for gradient in ("full", "checkpoint"):
        (short, latent), (long, _) = (saved(tiny, conds, gradient, steps) for steps in (1, 3))
        grown[gradient] = (long - short) / 2
        one = short if gradient == "full" else one
    assert grown["full"] == pytest.approx(one, rel=0.05)
    assert latent <= grown["checkpoint"] <= 2 * latent + 32
    assert grown["full"] > 200 * grown["checkpoint"]


def test_batched_and_separate_branches_have_one_gradient():
    """CFG asks for both branches in one call of the network; two calls give the same gradients."""
    torch.manual_seed(0)
    body = torch.nn.Linear(4, 2).double()

    class Net:
        prediction_type = "flow"

        def __call__(self, x, at, cond):
            return predicted("flow", x, at, body(torch.cat([x, cond["c"]], 1)).tanh())

        def parameters(self):
            return body.parameters()

    conds = {name: {"c": torch.randn(3, 2, dtype=torch.float64, requires_grad=True)} for name in ("cond", "uncond")}
    x, levels = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), grid(flow, 4, 0.9, 0.0)

    class Apart:
        tensors = (*(c["c"] for c in conds.values()), *body.parameters())

        def __call__(self, path, at):
            c, u = (Net()(path.x, at, conds[name]) for name in ("cond", "uncond"))
            mix = lambda a, b: b + 2.0 * (a - b)  # noqa: E731
            return c._replace(x0=mix(c.x0, u.x0), eps=mix(c.eps, u.eps))

    found = []
    for predict in (guided(Net(), CFG(2.0), conds), Apart()):
        end = rollout(euler, predict, x, levels).x
        found.append(torch.autograd.grad(end.square().sum(), [x, *Apart.tensors]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["ancestral", "sde_dpmpp_2m"])
def test_seeded_noise_is_stored_noise(name):
    x, generator = torch.randn(2, 2), torch.Generator().manual_seed(1)
    stored = [gaussian(x, generator) for _ in LEVELS[1:]]
    *_, seeded = sample(SAMPLERS[name], Toy(), Path(x), LEVELS, torch.Generator().manual_seed(1))
    assert torch.equal(rollout(SAMPLERS[name], Toy(), x, LEVELS, noise=stored).x, seeded.x)


# ------------------------------------------------------------------------------------------------ traps


class Toy:
    """u = w x, with whatever a test hangs on it."""

    def __init__(self, w=None):
        self.w = torch.ones(1, 2).requires_grad_() if w is None else w
        self.tensors = (self.w,)

    def __call__(self, path, at):
        return predicted("flow", path.x, at, self.w * path.x)


LEVELS = grid(flow, 3)
X = torch.ones(2, 2)


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler])
def test_a_scheduler_is_no_step(kind):
    scheduler = kind()
    scheduler.set_timesteps(3)
    for step in (scheduler, scheduler.step, partial(scheduler.step, return_dict=False)):
        with pytest.raises(ValueError, match=rf"{kind.__name__} as a step.*SAMPLERS.*levels_of"):
            rollout(step, Toy(), X, levels_of(scheduler))
    with pytest.raises(ValueError, match="'euler'.*pass a function"):
        rollout("euler", Toy(), X, LEVELS)


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "truncated:2", "truncated:2:drtune", "revolve:2"])
def test_a_generator_inside_is_refused(gradient):
    generator = torch.Generator().manual_seed(0)

    def drawing(predict, path, now, then, noise=None, *, source=None):
        fresh = torch.randn(path.x.shape, generator=source or generator)
        return ancestral(predict, path, now, then, fresh)

    class Augmented(Toy):
        def __call__(self, path, at):
            return super().__call__(Path(path.x + torch.randn(path.x.shape, generator=GENERATORS[0])), at)

    class Own(torch.Generator):
        pass

    GENERATORS = [generator]
    for step in (drawing, partial(drawing, source=generator), partial(partial(drawing), source=generator)):
        with pytest.raises(ValueError, match="the step holds a torch.Generator.*draw before the run"):
            rollout(step, Toy(), X, LEVELS, gradient)
    for noise in (generator, [generator] * 3):
        with pytest.raises(ValueError, match="noise is a torch.Generator.*a tensor a step"):
            rollout(ancestral, Toy(), X, LEVELS, gradient, noise)
    for GENERATORS[0] in (generator, Own()):
        with pytest.raises(ValueError, match="used inside the step.*draw before the run"):
            rollout(euler, Augmented(), X, LEVELS, gradient)
    assert torch.randn(1, generator=generator).isfinite()  # outside of a run it serves on


def test_a_generator_in_a_recomputed_region_would_be_wrong():
    """What the refusal is for."""
    generator, w = torch.Generator().manual_seed(0), torch.ones(1, 2).requires_grad_()

    class Augmented(Toy):
        def __call__(self, path, at):
            return predicted("flow", path.x, at, self.w * torch.randn(path.x.shape, generator=generator))

    p = Recomputed(Augmented(w))(Path(X), LEVELS[0])
    (again,) = torch.autograd.grad(p.x0.sum(), w)
    drawn = torch.randn(X.shape, generator=generator.manual_seed(0))
    assert not torch.allclose(again, -drawn.sum(0, keepdim=True))


def test_a_stochastic_step_needs_its_noise():
    for step in (ancestral, partial(ancestral, eta=0.5), SAMPLERS["sde_dpmpp_2m"]):
        with pytest.raises(ValueError, match="stochastic step needs noise"):
            rollout(step, Toy(), X, LEVELS)
        with pytest.raises(ValueError, match="stochastic"):
            step(Toy(), Path(X), *LEVELS[:2])


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "revolve:2", "truncated:2:alignprop", "truncated:2:refl"])
def test_nothing_that_requires_grad_is_an_error(gradient):
    frozen = Toy(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"nothing .* requires grad.*requires_grad_\(\).*no_grad"):
        rollout(euler, frozen, X, LEVELS, gradient)
    with torch.no_grad():
        assert not rollout(euler, frozen, X, LEVELS, gradient).x.requires_grad
    assert rollout(euler, Toy(), X, LEVELS, gradient).x.requires_grad


def disabled(network):
    network.disable_adapters()
    return network.enable_adapters


def rescaled(network):
    layers = [m for m in network.modules() if isinstance(getattr(m, "scaling", None), dict)]
    for m in layers:
        m.set_scale("default", 3.0)
    return lambda: [m.set_scale("default", 1.0) for m in layers]


def removed(network):
    attention = network.mid_block.attentions[0].transformer_blocks[0].attn1
    kept, attention.to_q = attention.to_q, attention.to_q.base_layer
    return lambda: setattr(attention, "to_q", kept)


def trained(network):
    network.train(not network.training)
    return lambda: network.train(not network.training)


def stepped(network):
    weight = next(p for p in network.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.add_(1.0)
    return lambda: weight.data.sub_(1.0)


CHANGES = {disabled: "adapters", rescaled: "adapters", removed: "adapters", trained: "train", stepped: "in place"}


@pytest.mark.parametrize(
    "change, gradient",
    [
        *((change, "checkpoint") for change in CHANGES),
        (disabled, "truncated:1:alignprop"),
        (disabled, "truncated:1:drtune"),
        (disabled, "revolve:1"),
        (trained, "revolve:1"),
    ],
)
def test_a_network_that_changed_before_backward_is_an_error(tiny, conds, change, gradient):
    path, _ = run(tiny, conds, euler, gradient, steps=1)
    restore = change(tiny[0].network)
    try:
        with pytest.raises(ValueError, match=rf"{CHANGES[change]}.*backward\(\) first.*gradient='full'"):
            path.x.sum().backward()
    finally:
        restore()
    assert all(w.requires_grad for w in tiny[1])


def test_full_survives_what_checkpoint_refuses(tiny, conds):
    path, (x, *_) = run(tiny, conds, euler, "full", steps=1)
    (whole,) = torch.autograd.grad(path.x.sum(), x, retain_graph=True)
    restore = disabled(tiny[0].network)
    try:
        assert torch.equal(torch.autograd.grad(path.x.sum(), x)[0], whole)
    finally:
        restore()


def test_adapters_may_change_between_runs(tiny, conds):
    """Only a change between a forward pass and its backward pass counts."""
    for change in (rescaled, trained):
        restore = change(tiny[0].network)
        assert all(g.isfinite().all() for g in gradients(tiny, conds, euler, "checkpoint", steps=1))
        restore()
