"""The counter of live bytes against arithmetic, and what saves memory without changing a bit."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from difftune.pipelines import lora
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from solvers.latent import LatentModel
from solvers.memory import offload
from solvers.memory.checkpointing import apart, block_checkpointing, has_blocks
from solvers.memory.live import UNBOUNDED, LiveBytes, measured
from solvers.memory.offload import offloaded
from solvers.noise import cosine, grid
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import SAMPLERS, euler, is_stochastic
from tests.support import pipelines
from tests.support.sweeps import Net, randn


@pytest.fixture(scope="module")
def pipe():
    """With an adapter that is not at its zero start."""
    pipe = pipelines.sd()
    with torch.no_grad():
        for i, weight in enumerate(lora.add(pipe, rank=2).values()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return pipe


class Job:
    """A guided run of a few steps, its images, and their gradient."""

    def __init__(self, pipe, steps=3, batch=1):
        self.model = LatentModel(pipe)
        with torch.no_grad():
            self.conds = self.model.encode(["red circle", "blue square"][:batch])
        self.words = self.conds["cond"]["encoder_hidden_states"].requires_grad_()
        self.predict = guided(self.model.denoiser, CFG(5.0), self.conds)
        self.levels = self.model.levels(steps)
        self.x = self.model.noise(batch, torch.Generator().manual_seed(0)).requires_grad_()
        self.noise = torch.randn(steps, *self.x.shape, generator=torch.Generator().manual_seed(1))

    def run(self, gradient, step=euler, x=None):
        x = self.x if x is None else x
        return rollout(step, self.predict, x, self.levels, gradient, self.noise)

    def gradients(self, gradient, step=euler, checkpointed=True):
        images = self.model.decode(self.run(gradient, step).x, checkpointed)
        return torch.autograd.grad(images.square().sum(), [self.x, self.words, *self.parameters()])

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def saved(pipe, function) -> int:
    """Bytes of what `function` saves for backward, each storage once, weights left out."""
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        end = function()  # holds the graph while it is counted
    return sum(sizes.values()) if end.requires_grad else 0


def test_live_bytes_are_those_of_storages_that_are_there():
    x = torch.ones(100)
    with LiveBytes() as live:
        y = x * 2
        z = y[10:]  # a view: nothing new
        w = x.t()  # of what was here before
        assert (live.now, live.peak) == (400, 400)
        w = y.double()
        assert live.now == 1200
        del w
        assert (live.now, live.peak) == (400, 1200)
        del y
        assert live.now == 400  # z holds it
        del z
        assert live.now == 0


def test_memory_of_a_chain_is_its_arithmetic():
    """exp keeps its output; on the way back there is one gradient more, and the product while that is made."""
    x = torch.ones(1000, dtype=torch.float64)
    kept, peak = measured(lambda x: [x.exp().exp()], x)
    assert kept == 2 * 8000
    assert peak == (2 + 1 + 2) * 8000  # both outputs, the output's gradient, and a product made of another
    assert measured(lambda x: [x.exp().exp()], x) == (kept, peak)


def test_measuring_leaves_random_state_and_gradients_alone():
    weight, before = torch.ones(3, requires_grad=True), torch.get_rng_state()
    measured(lambda x: [torch.rand(3) * weight * x], torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before) and weight.grad is None


def test_no_room_is_without_bound():
    def fail(x):
        raise torch.OutOfMemoryError("no room")

    assert measured(fail, torch.ones(1)) == UNBOUNDED


@pytest.mark.parametrize("name", ["euler", pytest.param("heun", marks=pytest.mark.slow), "dpmpp_2m"])
@pytest.mark.sampled(2)
def test_full_grows_by_graphs_and_checkpoint_by_latents(pipe, name):
    """Per step: what the hooks of saved tensors see of the one, and at most two latents a network call of the other."""
    jobs = [Job(pipe, 2), Job(pipe, 3)]
    run = lambda job, mode: lambda x: [job.run(mode, SAMPLERS[name], x).x]  # noqa: E731
    slope = lambda values: values[1] - values[0]  # noqa: E731
    graph = slope([measured(run(job, "full"), job.x).kept for job in jobs])
    a_step = slope([measured(run(job, "checkpoint"), job.x).kept for job in jobs])
    assert graph == pytest.approx(slope([saved(pipe, lambda j=j: run(j, "full")(j.x)[0]) for j in jobs]), rel=0.05)
    calls, latent = (2 if name == "heun" else 1), jobs[0].x.nbytes
    assert calls * latent <= a_step <= 2.1 * calls * latent
    assert a_step < graph / 100


@pytest.mark.parametrize(("name", "gradient"), [("euler", "full"), *((name, "checkpoint") for name in SAMPLERS)])
@pytest.mark.sampled(3)
def test_blocks_recomputed_give_the_same_bits(pipe, name, gradient):
    job = Job(pipe, batch=2)
    plain = job.gradients("full", SAMPLERS[name], checkpointed=False)
    with block_checkpointing(pipe.unet, pipe.vae):
        blocks = job.gradients(gradient, SAMPLERS[name])
    assert all(torch.equal(a, b) for a, b in zip(plain, blocks, strict=True))
    assert all(g.abs().max() > 0 for g in plain)


def test_blocks_recomputed_need_less(pipe):
    job = Job(pipe, 2)
    runs = []
    for context in (nullcontext(), block_checkpointing(pipe.unet, pipe.vae)):
        with context:
            call = measured(lambda x: [job.run("checkpoint", x=x).x], job.x)
            decode = measured(lambda x: [job.model.decode(x, checkpointed=True)], job.x)
            runs.append((call.peak, decode.peak))
    (call, decode), (call_blocks, decode_blocks) = runs
    assert call_blocks < call / 2 and decode_blocks < decode / 1.5


def test_block_checkpointing_is_restored_as_it_was(pipe):
    state = lambda: [getattr(m, "gradient_checkpointing", None) for m in pipe.unet.modules()]  # noqa: E731
    before = state()
    assert True not in before
    with pytest.raises(ZeroDivisionError), block_checkpointing(pipe.unet):
        assert True in state()
        raise ZeroDivisionError
    assert state() == before
    pipe.unet.enable_gradient_checkpointing()
    on = state()
    with block_checkpointing(pipe.unet):
        pass
    assert state() == on
    pipe.unet.disable_gradient_checkpointing()


def test_backward_outside_of_block_checkpointing_is_an_error(pipe):
    job = Job(pipe)
    with block_checkpointing(pipe.unet):
        end = job.run("checkpoint").x
    with pytest.raises(RuntimeError, match="recomput"):
        end.sum().backward()


def test_a_model_without_blocks_is_named(pipe):
    assert has_blocks(pipe.unet) and has_blocks(pipe.vae)

    class Plain(torch.nn.Module):
        _supports_gradient_checkpointing = False

    with pytest.raises(ValueError, match="Plain has no blocks"), block_checkpointing(Plain()):
        pass


def test_a_reward_apart_has_the_same_gradient_and_keeps_nothing():
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(50, 400), torch.nn.Dropout(0.5), torch.nn.GELU()), torch.randn(4, 50)
    whole = lambda x: [net(x).sum(), net(x).square().sum()]  # noqa: E731
    split = lambda x: [apart(net)(x).sum(), apart(lambda x: net(x).square().sum())(x)]  # noqa: E731
    grads = []
    for function in (whole, split):
        torch.manual_seed(1)
        y = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(sum(function(y)), [y, *net.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert measured(split, x).kept < measured(whole, x).kept / 2
    assert measured(split, x).peak < measured(whole, x).peak


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_offloaded_latents_give_the_same_bits(pipe, device):
    """ "meta" stands for a device that is no CPU: what is saved is copied to the host, and comes back."""
    job, moved = Job(pipe), []
    plain = job.gradients("checkpoint")
    with offloaded(device) as said:
        end = job.run("checkpoint")
    images = job.model.decode(end.x, True)
    moved = torch.autograd.grad(images.square().sum(), [job.x, job.words, *job.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
    assert ("nothing to do" in said) == (device == "cpu")


@pytest.mark.parametrize(
    ("name", "gradient"),
    [*((name, "checkpoint") for name in SAMPLERS), ("euler", "truncated:4:alignprop"), ("heun", "truncated:4")]
    + [(None, "adjoint:heun"), (None, "reversible:bdia")],
)
def test_no_latent_stays_where_saved_tensors_are_moved(name, gradient, monkeypatch):
    """The device keeps the caller's x alone of all that the network was called with; a copy stands for the host's."""
    step = None if name is None else SAMPLERS[name]
    copying = lambda pin_memory: saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)  # noqa: E731
    monkeypatch.setattr(offload, "save_on_cpu", copying)
    met, net, levels = [], Net(randn(3, 2, seed=3).requires_grad_()), grid(cosine, 5, 0.95, 0.0)

    def noted(path, at):
        met.append([weakref.ref(t.untyped_storage()) for t in (path.x, *path.memory.values())])
        return net(path, at)

    noted.tensors = net.tensors
    x, noise = randn(3, 2).requires_grad_(), randn(5, 3, 2, seed=9) if is_stochastic(step) else None
    with offloaded("meta", gradient):
        end = rollout(step, noted, x, levels, gradient, noise).x
    own = x.untyped_storage()
    left = [storage for refs in met[:-1] for ref in refs if (storage := ref()) is not None]
    assert all(storage.data_ptr() == own.data_ptr() for storage in left) and len(met) >= 5
    moved = torch.autograd.grad(end.square().sum(), [x, *net.tensors], allow_unused=True)
    again = rollout(step, net, x, levels, gradient, noise).x
    plain = torch.autograd.grad(again.square().sum(), [x, *net.tensors], allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(moved, plain, strict=True))


def test_offload_wants_latents():
    with pytest.raises(ValueError, match="whole graphs"), offloaded("cuda", "full"):
        pass
    for mode in ("revolve:8", "lean", "adjoint:exact_endpoint"):
        with pytest.raises(ValueError, match=f"'{mode}' holds its states on the device"), offloaded("cuda", mode):
            pass
