"""The plan for a memory budget: read, predicted, chosen, and kept to."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from guidance.guided import guided
from guidance.methods.catalogue import CFG
from rewards.wrappers.batched import Batched
from solvers.latent import LatentModel
from solvers.memory.budget import (
    Plan,
    Probe,
    candidates,
    cost,
    parameters_bytes,
    parse_size,
    planned,
    probe,
    size_text,
    with_peak,
)
from solvers.memory.live import UNBOUNDED, Footprint, LiveBytes
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import euler
from tests.support import pipelines

MEASURED = Probe(  # round numbers of a large network, in MB
    full=Footprint(1500, 1600),
    checkpoint=Footprint(1, 1600),
    blocks=Footprint(1, 400),
    decode=Footprint(6, 2800),
    decode_blocks=Footprint(6, 500),
    reward=Footprint(300, 350),
    rewards_apart=Footprint(2, 200),
    inputs=1,
    held=100,
)
STEPS, BATCH = 10, 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("1.5 MiB", 3 * 2**19), ("10gb", 10**10), ("7", 7), (7, 7), ("512KiB", 2**19), ("3B", 3)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "6 GiBs", "-1GiB", "0", "0.0GiB", "6,5GiB", "1e9"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ValueError, match=f"cannot read the size '{text}'.*as in 6GiB"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 1023, 1024, 123456, 6 * 2**30, 6 * 2**30 + 1, 10**13])
def test_a_size_that_is_said_does(size):
    assert size <= parse_size(size_text(size)) <= 1.01 * size + 11


def test_cheapest_that_fits_wins():
    choose = lambda size: planned(MEASURED, size, STEPS, BATCH)  # noqa: E731
    everything = choose(10**6)
    assert (everything.gradient, everything.micro_batch) == ("full", 4)
    assert everything.peak == 100 + 4 * (15001 + 3 * 6) + 2800
    assert choose(everything.peak - 1).micro_batch == 2
    one = choose(100 + 15001 + 18 + 500)
    assert (one.gradient, one.micro_batch, one.decoder_blocks, one.rewards_apart) == ("full", 1, True, False)
    kept = choose(15000)
    assert (kept.gradient, kept.micro_batch, kept.blocks, kept.decoder_blocks) == ("checkpoint", 4, False, False)
    assert choose(100 + 1629).gradient == "checkpoint" and not choose(100 + 1629).blocks
    last = choose(100 + 529)
    assert (last.blocks, last.decoder_blocks, last.micro_batch) == (True, True, 1)


def test_as_many_images_are_decoded_at_a_time_as_are_asked_for_and_fit():
    large = planned(MEASURED, 10**6, STEPS, BATCH, decode_batch=4)
    assert (large.decode_batch, large.peak) == (4, 100 + 4 * (15001 + 3 * 6) + 4 * 2800)
    assert "4 decoded at a time" in str(large)
    assert planned(MEASURED, large.peak - 1, STEPS, BATCH, decode_batch=4).decode_batch == 2
    assert planned(MEASURED, 10**6, STEPS, BATCH).decode_batch == 1


@pytest.mark.slow
def test_cost_falls_as_the_budget_grows_and_the_peak_stays_within():
    least = min(plan.peak for plan in candidates(MEASURED, STEPS, BATCH))
    plans = [planned(MEASURED, size, STEPS, BATCH) for size in range(least, 80_000, 97)]
    assert all(plan.peak <= size for plan, size in zip(plans, range(least, 80_000, 97), strict=True))
    costs = [cost(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) > 6


@pytest.mark.parametrize("gradient", [None, "checkpoint", "full", "truncated:3"])
def test_the_least_budget_is_named_and_does(gradient):
    with pytest.raises(ValueError, match="memory_budget 10 is too small: the least that does is") as error:
        planned(MEASURED, 10, STEPS, BATCH, gradient)
    least = parse_size(str(error.value).partition("the least that does is ")[2].partition(",")[0])
    plan = planned(MEASURED, least, STEPS, BATCH, gradient)
    assert gradient in (None, plan.gradient)
    with pytest.raises(ValueError, match="too small"):
        planned(MEASURED, plan.peak - 1, STEPS, BATCH, gradient)


def test_a_plan_is_one_line_that_says_why():
    assert str(planned(MEASURED, "100000B", STEPS, BATCH)) == (
        "full, 4 of 4 images at a time (predicted peak 61.5KiB of 100000B; nothing is faster)"
    )
    assert str(planned(MEASURED, "1KiB", STEPS, BATCH)) == (
        "checkpoint, network blocks recomputed, decoder blocks recomputed, 2 of 4 images at a time"
        " (predicted peak 958B of 1KiB; the fastest, full, 4 of 4 images at a time, needs 61.5KiB)"
    )


def test_revolve_is_planned_where_latents_are_what_is_large():
    """States as large as graphs; the slots are the most that fit."""
    large = Probe(full=Footprint(150, 200), checkpoint=Footprint(100, 200))
    peaks = [planned(large, size, 10, 1) for size in (1700, 1199, 700, 300)]
    assert [plan.gradient for plan in peaks] == ["full", "revolve:9", "revolve:5", "revolve:1"]
    assert [plan.peak for plan in peaks] == [1550, 1100, 700, 300]
    calls = [plan.calls for plan in peaks]
    assert calls == sorted(calls) and calls[1] == 3.0 and calls[-1] == 2 + 46 / 10


@pytest.fixture(scope="module")
def pipe():
    pipe = pipelines.sd()
    pipe.unet.requires_grad_(False)
    return pipe


REWARDS = (lambda images: images.sin().square().mean((1, 2, 3)), lambda images: images.exp().amax((1, 2, 3)))


def rewards_of(plan):
    """As functions of images and prompts, in the parts that are planned."""
    whole = [lambda images, prompts, f=f: f(images) for f in REWARDS]
    parts = plan.in_parts or plan.rewards_apart
    return [Batched(f, plan.decode_batch, gradient_checkpointing=True) for f in whole] if parts else whole


class Job:
    """Images of noise, their rewards, and the gradient."""

    def __init__(self, pipe, steps, batch):
        self.model, self.pipe = LatentModel(pipe), pipe
        with torch.no_grad():
            self.conds = self.model.encode(["red circle"] * batch)
            self.x = self.model.noise(batch, torch.Generator().manual_seed(0))
        self.levels = self.model.levels(steps)

    def probe(self, limit=None) -> Probe:
        return probe(
            euler,
            guided(self.model.denoiser, CFG(5.0), self.conds),
            self.x,
            self.levels,
            network=self.pipe.unet,
            decode=lambda x: self.model.decode(x, checkpointed=True),
            decoder=self.pipe.vae,
            rewards=REWARDS,
            limit=limit,
        )

    def gradient(self, plan):
        """The gradient of the sum of rewards with respect to the noise."""
        found = []
        with plan.applied(self.pipe.unet, self.pipe.vae):
            for rows in plan.split(range(len(self.x))):
                x = self.x[list(rows)].requires_grad_()
                conds = {k: {n: v[list(rows)] for n, v in c.items()} for k, c in self.conds.items()}
                path = rollout(euler, guided(self.model.denoiser, CFG(5.0), conds), x, self.levels, plan.gradient)
                images = replace(self.model, decode_batch=plan.decode_batch).decode(path.x, checkpointed=True)
                found += torch.autograd.grad(sum(f(images, rows).sum() for f in rewards_of(plan)), x)
        return torch.cat(found)


@pytest.fixture(scope="module")
def tiny(pipe):
    return Job(pipe, 4, 1).probe()


def test_the_probe_leaves_everything_as_it_was(pipe):
    job, before = Job(pipe, 4, 1), torch.get_rng_state()
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    job.probe()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in pipe.unet.named_parameters())
    assert not any(vars(module).get("gradient_checkpointing") for module in pipe.unet.modules())


KINDS = [  # mode, images at a time, network's blocks, decoder's, rewards one at a time
    ("full", 3, False, False, False),
    ("full", 1, False, True, True),
    ("checkpoint", 3, False, False, True),
    ("checkpoint", 2, True, False, False),
    ("checkpoint", 1, True, True, True),
    ("checkpoint", 3, False, False, False, 2),
    ("full", 3, False, True, False, 3),
]


@pytest.mark.slow
@pytest.mark.sampled(2)
def test_every_kind_of_plan_runs_within_its_prediction_and_gives_the_same_gradient(pipe, tiny):
    """Predicted from one image and one step; measured on three steps of three images."""
    job, expected = Job(pipe, 3, 3), None
    for mode, size, *extras in KINDS:
        plan = with_peak(tiny, Plan(mode, size, 3, *extras), 3)
        with LiveBytes() as live:
            gradient = job.gradient(plan)
        expected = gradient if expected is None else expected
        assert 0.5 * plan.peak <= live.peak <= plan.peak, str(plan)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_probe_keeps_the_budget_and_gives_up_on_what_does_not_fit(pipe, tiny):
    limit = (tiny.blocks.peak + tiny.checkpoint.peak) // 2
    job = Job(pipe, 4, 1)
    with LiveBytes() as live:
        found = job.probe(limit)
    assert live.peak <= limit + 2**16  # one tensor more, at which it stops
    assert found.full == found.checkpoint == UNBOUNDED
    assert (found.blocks, found.decode, found.reward) == (tiny.blocks, tiny.decode, tiny.reward)
    assert str(planned(found, limit, 4, 1)).endswith("the fastest, full, 1 of 1 images at a time, needs more)")


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_budget_is_kept(pipe, tiny, share):
    peaks = sorted({plan.peak for plan in candidates(tiny, 3, 2)})
    limit = peaks[int(share * len(peaks))]
    plan, job = planned(tiny, limit, 3, 2), Job(pipe, 3, 2)
    with LiveBytes() as live:
        job.gradient(plan)
    assert live.peak <= limit, str(plan)


@pytest.mark.parametrize("gradient", ["full", "checkpoint"])
def test_predicted_bytes_are_those_that_are_kept(pipe, tiny, gradient):
    """Between forward and backward."""
    job = Job(pipe, 4, 2)
    x = job.x.requires_grad_()
    with LiveBytes() as live:
        end = rollout(euler, guided(job.model.denoiser, CFG(5.0), job.conds), x, job.levels, gradient)
        assert live.now == pytest.approx(2 * 4 * getattr(tiny, gradient).kept, rel=0.07)
    assert end.x.requires_grad


def test_modes_predicted_by_what_they_keep(tiny):
    plan = next(iter(candidates(tiny, 8, 1, "checkpoint")))
    peak = lambda gradient: with_peak(tiny, replace(plan, gradient=gradient), 8)  # noqa: E731
    assert peak("truncated:8:draft").peak == peak("checkpoint").peak == peak("adjoint:euler").peak
    assert peak("truncated:2").peak < peak("truncated:8").peak
    assert peak("reversible:bdia").peak == peak("truncated:2").peak
    assert peak("truncated:2:draft_lv").peak > peak("truncated:2").peak
    assert peak("truncated:8").calls == 3.0 and peak("truncated:2").calls == 1.5


def test_weights_count_once():
    layer = torch.nn.Linear(3, 2)
    assert parameters_bytes(layer, torch.nn.Sequential(layer), nullcontext) == 4 * 8
