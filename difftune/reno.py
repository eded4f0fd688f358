"""ReNO: optimise the initial noise of a picture on a reward, at inference (https://arxiv.org/abs/2406.04312).

    minimise over eps   -sum_i w_i R_i(decode(sample(eps, c)), c) + gamma K(eps),

where K is minus the log density of |eps|, which is chi-distributed for Gaussian noise: it keeps the noise on the shell
where the network has seen noise.

    best = ReNO(pipe, rewards={"tiny-clip": 1.0}).optimize(["a red circle left of a blue square"], iterations=50)
    best.images, best.noises, best.rewards, best.history
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import lgamma, log, sqrt
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from difftune import runs
from difftune.checkpoint import Say
from difftune.configs import RenoConfig
from difftune.engine import (
    Engine,
    check_engine,
    held,
    kernels,
    one_at_a_time,
    plan_for,
    probe_step,
    scores_of,
    step_of,
    wants_noise,
)
from difftune.errors import RunError, UserError
from difftune.models import load as load_model
from difftune.named import (
    at_least,
    differentiable,
    gradient_named,
    guidance_named,
    model_named,
    reward_named,
    sampler_named,
)
from difftune.outputs import grid, png, unused, write, write_json
from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from guidance.methods import Plain
from rewards.compose import WeightedSum
from rewards.registry import Reward
from solvers.budget import Plan, Probe, probe
from solvers.denoiser import Cond
from solvers.latent import LatentModel
from solvers.noise import Noise
from solvers.rollout import rollout
from solvers.samplers import gaussian

PAPER_RATE, PAPER_SIZE = 5.0, 16_384  # learning rate at D = 4 x 64 x 64


def chi_log_density(radius: Tensor, dimension: int) -> Tensor:
    """log p(r) = (D - 1) log r - r^2 / 2 - (D / 2 - 1) log 2 - log Gamma(D / 2): the norm of D unit normals."""
    return (dimension - 1) * radius.log() - radius**2 / 2 - (dimension / 2 - 1) * log(2) - lgamma(dimension / 2)


def regularizer(noise: Tensor) -> Tensor:
    """K (B,) = -log p(|eps|), least at |eps| = sqrt(D - 1). In float64: |eps|^2 alone exceeds float16 at D = 65536."""
    flat = noise.double().flatten(1)
    return -chi_log_density(flat.norm(dim=1), flat.shape[1])


def learning_rate(dimension: int) -> float:
    """5 sqrt(D / 16384): an update is bounded by a share of the noise's norm, which is sqrt(D), and that share is kept.

    It gives the paper's 5 for 512-pixel models, and its 10 for the 1024-pixel Hyper-SDXL.
    """
    return PAPER_RATE * sqrt(dimension / PAPER_SIZE)


class Iteration(NamedTuple):
    """One evaluation of all noises, before their update; each tensor is on the CPU and holds a number per prompt."""

    parts: dict[str, Tensor]  # each reward, without its weight
    total: Tensor  # (B,), the weighted sum: what is maximised, and what chooses the best
    regularizer: Tensor  # (B,), K
    grad_norm: Tensor  # (B,), before the clip; 0 in the last iteration, which needs none


class Live(NamedTuple):
    """Where an optimisation stands."""

    iteration: int  # from 0
    images: Tensor  # (B, 3, H, W) in [0, 1], of this iteration
    noises: Tensor  # (B, C, h, w), which made them
    record: Iteration


class Result(NamedTuple):
    """The best image of each prompt by the total reward alone, regulariser aside, and how it was found."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    noises: Tensor  # (B, C, h, w), which make them
    rewards: Tensor  # (B,)
    images_before: Tensor
    noises_before: Tensor
    rewards_before: Tensor
    history: list[Iteration]
    plan: Plan  # how the engine ran


@dataclass(frozen=True)
class ReNO:
    """Noise optimisation on a diffusers pipeline, which is left as it was.

    rewards: weights by name, or a differentiable reward. guidance: a method; none by default, as few-step models want.
    learning_rate: of SGD with Nesterov momentum; None is 5 sqrt(D / 16384). gradient: a mode of `solvers.rollout`; None
    is "checkpoint", or what `memory_budget` ("6GiB", weights included) has room for: one step is measured, and mode,
    block checkpointing and the prompts at a time are chosen to fit.
    Raises UserError for a reward that is unknown or not differentiable.
    """

    pipe: Any
    rewards: Mapping[str, float] | Reward
    num_inference_steps: int = 1
    guidance: Guidance | None = None
    learning_rate: float | None = None
    regularization: float = 0.01
    grad_clip: float = 0.1
    momentum: float = 0.9
    gradient: str | None = None
    sampler: str = "euler"
    progress: bool = True
    memory_budget: str | None = None

    def __post_init__(self):
        sampler_named(self.sampler)
        if self.gradient is not None:
            gradient_named(self.gradient, self.num_inference_steps, self.sampler, "noise")
        check_engine(self.memory_budget, xformers=False)
        differentiable(self.rewards)

    def optimize(
        self,
        prompts: Sequence[str],
        iterations: int = 50,
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Result:
        """The best of `iterations` images for each prompt; the first is that of the initial noise, so none gets worse.

        The i-th prompt's noise is drawn with seed + i, whatever the batch; `generator` (one, or one per prompt)
        replaces that. Raises RunError where a reward or a gradient is not finite.
        """
        objective = self._objective(prompts, iterations, seed, generator)
        steps = self._iterate(objective, iterations)
        live = first = best = next(steps)
        history = [first.record]
        for live in tqdm(steps, "ReNO", iterations, initial=1, disable=not self.progress):
            history.append(live.record)
            best = better(best, live)
        after = (best.images, best.noises, best.record.total)
        return Result(*after, first.images, first.noises, first.record.total, history, objective.plan)

    def planned(self, prompts: Sequence[str]) -> Plan:
        """How the engine runs for these prompts; measured where there is a memory budget."""
        return self._objective(prompts, 1, 0, None).plan

    def iterate(
        self,
        prompts: Sequence[str],
        iterations: int = 50,
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Live]:
        """Each iteration as it is made: image and reward of the present noise; the noise moves on in between."""
        yield from self._iterate(self._objective(prompts, iterations, seed, generator), iterations)

    def _iterate(self, objective: "Objective", iterations: int) -> Iterator[Live]:
        x = objective.noise.requires_grad_()
        rate = learning_rate(x[0].numel()) if self.learning_rate is None else self.learning_rate
        optimizer = torch.optim.SGD([x], rate, momentum=self.momentum, nesterov=self.momentum > 0)
        for i in range(iterations):
            moves = i < iterations - 1
            images, record, x.grad = objective.evaluate(x, i, moves)
            yield Live(i, images, x.detach().clone(), record)
            if moves:
                clip_each(x, self.grad_clip)
                optimizer.step()

    def _objective(self, prompts: Sequence[str], iterations: int, seed: int, generator: Any) -> "Objective":
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        at_least(1, iterations=iterations, num_inference_steps=self.num_inference_steps)
        if not prompts:
            raise UserError("the list of prompts is empty: give at least one")
        generator = generator or [fresh(seed + i) for i in range(len(prompts))]
        model = LatentModel(self.pipe)
        reward = reward_named(self.rewards) if isinstance(self.rewards, Mapping) else one_sum(self.rewards)
        with torch.no_grad():
            conds = model.encode(prompts)
            x = model.noise(len(prompts), generator)
            drawn = wants_noise(self.gradient, sampler_named(self.sampler))
            fixed = [gaussian(x, generator) for _ in range(self.num_inference_steps)] if drawn else None
        whole = Plan(self.gradient or "checkpoint", len(prompts), len(prompts))
        objective = Objective(self, model, reward, prompts, conds, x, fixed, whole)
        plan = objective.planned()
        return replace(objective, reward=one_at_a_time(reward, plan), plan=plan)


@dataclass(frozen=True)
class Objective:
    """The function of the noise that is minimised, for one batch of prompts."""

    settings: ReNO
    model: LatentModel
    reward: WeightedSum
    prompts: list[str]
    conds: Mapping[str, Cond]
    noise: Tensor  # (B, C, h, w), the initial one
    fixed: list[Tensor] | None  # what a stochastic sampler adds: drawn once, else the objective is random
    plan: Plan

    def evaluate(self, x: Tensor, iteration: int, backward: bool) -> tuple[Tensor, Iteration, Tensor | None]:
        """Images, what is recorded of them, and the gradient of the loss, a sum over prompts, if asked for."""
        rows = self.plan.split(range(len(x)))
        with frozen(self.model.pipe), self.plan.applied(self.model.network, self.model.pipe.vae):
            found = [self.at(part)._evaluate(x[part.start : part.stop], iteration, backward) for part in rows]
        gradients = [gradient for *_, gradient in found if gradient is not None]
        images, record = torch.cat([images for images, *_ in found]), joined([record for _, record, _ in found])
        return images, record, torch.cat(gradients) if gradients else None

    def _evaluate(self, x: Tensor, iteration: int, backward: bool) -> tuple[Tensor, Iteration, Tensor | None]:
        x = x.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            images = self.images(x)
            try:
                parts = self.reward.parts(images, self.prompts)
            except ValueError as error:  # a score that is not finite, and the reward and the prompt that it is of
                raise RunError(f"iteration {iteration + 1}: {error}") from error
            total = self.reward.total(parts)
            away = regularizer(x)
            loss = (self.settings.regularization * away - total.to(away)).sum()
            gradient = self._gradient(loss, x, iteration) if backward else None
        norm = torch.zeros(len(x)) if gradient is None else gradient.flatten(1).norm(dim=1)
        if not norm.isfinite().all():
            of = self.prompts[int(norm.isfinite().int().argmin())]
            raise RunError(f"iteration {iteration + 1}: the gradient of the noise for {of!r} is not finite")
        recorded = {name: scores.detach().cpu() for name, scores in parts.items()}
        record = Iteration(recorded, total.detach().cpu(), away.detach().cpu(), norm.cpu())
        return images.detach(), record, gradient

    def _gradient(self, loss: Tensor, x: Tensor, iteration: int) -> Tensor:
        try:
            return torch.autograd.grad(loss, x)[0]
        except FloatingPointError as error:  # of a sweep, or of a run that is watched
            raise RunError(f"iteration {iteration + 1}: {error}") from error

    def images(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], differentiable in the noise x (B, C, h, w)."""
        step, gradient = sampler_named(self.settings.sampler), self.plan.gradient
        path = rollout(step_of(gradient, step), self.predict, x, self.levels, gradient, self.fixed)
        return self.model.decode(path.x, checkpointed=True)

    @property
    def predict(self) -> GuidedPredict:
        return guided(self.model.denoiser, self.settings.guidance or Plain(), self.conds)

    @property
    def levels(self) -> list[Noise]:
        return self.model.levels(self.settings.num_inference_steps)

    def at(self, rows: range) -> "Objective":
        """The objective of some of the prompts."""
        part = slice(rows.start, rows.stop)
        conds = {branch: {key: value[part] for key, value in cond.items()} for branch, cond in self.conds.items()}
        fixed = None if self.fixed is None else [noise[part] for noise in self.fixed]
        return replace(self, prompts=self.prompts[part], conds=conds, noise=self.noise[part], fixed=fixed)

    def planned(self) -> Plan:
        """The plan for the memory budget, from one step for the first prompt."""
        settings, first = self.settings, self.at(range(1))

        def measure(limit: int | None) -> Probe:
            with frozen(self.model.pipe):
                return probe(
                    probe_step(settings.gradient, sampler_named(settings.sampler)),
                    first.predict,
                    first.noise,
                    self.levels,
                    first.fixed,
                    network=self.model.network,
                    decode=lambda x: self.model.decode(x, checkpointed=True),
                    decoder=self.model.pipe.vae,
                    rewards=scores_of(self.reward, first.prompts),
                    held=held(self.model, 0) + self._results(),
                    limit=limit,
                )

        steps = settings.num_inference_steps
        return plan_for(settings.memory_budget, settings.gradient, steps, len(self.prompts), measure)

    def _results(self) -> int:
        """Bytes of the noises, their momenta and gradients, and of the first, the best and the present images."""
        height, width = self.model.size()
        return 8 * self.noise.nbytes + 6 * len(self.prompts) * 3 * height * width * 4


def joined(records: Sequence[Iteration]) -> Iteration:
    """What was recorded of parts of a batch, as of the whole."""
    parts = {name: torch.cat([record.parts[name] for record in records]) for name in records[0].parts}
    return Iteration(parts, *(torch.cat(values) for values in list(zip(*records, strict=True))[1:]))


def one_sum(reward: Reward) -> WeightedSum:
    """The reward as a weighted sum of one, under its class's name."""
    name = type(reward).__name__
    return reward if isinstance(reward, WeightedSum) else WeightedSum({name: reward}, {name: 1.0})


def clip_each(x: Tensor, limit: float) -> None:
    """Scale each sample's gradient to a norm of at most `limit`, as torch's clip_grad_norm_ does for one."""
    assert x.grad is not None
    norm = x.grad.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    x.grad *= (limit / (norm + 1e-6)).clamp(max=1)


def better(best: Live, now: Live) -> Live:
    """Row by row, whichever has the greater total reward; the earlier in a tie."""
    gain = now.record.total > best.record.total

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(gain.to(a.device).view(-1, *[1] * (a.ndim - 1)), b, a)

    total = pick(best.record.total, now.record.total)
    return Live(
        now.iteration,
        pick(best.images, now.images),
        pick(best.noises, now.noises),
        best.record._replace(total=total),
    )


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Only the noise needs gradients: the pipeline's parameters do not, until the block is left."""
    trained = [p for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()]
    trained = [p for p in trained if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def fresh(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ the command


def run(config: RenoConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune optimize`: pictures before and after, optimize.json and noise.safetensors in a new folder.

    Returns what optimize.json holds. Nothing is written unless all of it can be.
    """
    check(config, pipe, reward)
    folder = unused(config.output_dir)
    started, say = time.perf_counter(), show or runs.shown
    reno = configured(config, pipe, reward)
    if torch.cuda.is_available() and pipe is None:
        reno.pipe.to("cuda")
    batches = range(0, len(config.prompt), config.batch_size)
    texts = [config.prompt[start : start + config.batch_size] for start in batches]
    network, exact = LatentModel(reno.pipe).network, config.deterministic
    with kernels(config.enable_xformers_memory_efficient_attention, exact, network) as attention:
        plan = reno.planned(texts[0])
        engine = Engine(plan, attention, exact).lines(plan.gradient)
        for name, line in engine.items():
            say(f"{name}: {line}")
        found = [reno.optimize(t, config.iterations, config.seed + i) for t, i in zip(texts, batches, strict=True)]
    summary = {**summarised(config, found), "engine": engine, "seconds": time.perf_counter() - started}
    for name, data in files(found):
        write(folder / name, data)
    write_json(folder / "optimize.json", summary)
    return summary


def configured(config: RenoConfig, pipe: Any, reward: Reward | None) -> ReNO:
    return ReNO(
        load_model(config.model) if pipe is None else pipe,
        reward_named(config.reward) if reward is None else reward,
        config.num_inference_steps,
        guidance_named(config.guidance, config.guidance_scale, config.guidance_options),
        config.learning_rate,
        config.regularization_weight,
        config.grad_clip,
        config.momentum,
        config.gradient,
        config.sampler,
        memory_budget=config.memory_budget,
    )


def check(config: RenoConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    if not config.prompt:
        raise UserError("there is no prompt to optimise: give at least one --prompt")
    at_least(1, iterations=config.iterations, batch_size=config.batch_size)
    at_least(1, num_inference_steps=config.num_inference_steps)
    at_least(0, learning_rate=config.learning_rate or 0, regularization_weight=config.regularization_weight)
    at_least(0, grad_clip=config.grad_clip, momentum=config.momentum)
    sampler_named(config.sampler)
    guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
    if config.gradient is not None:
        gradient_named(config.gradient, config.num_inference_steps, config.sampler, "noise")
    check_engine(config.memory_budget, config.enable_xformers_memory_efficient_attention)
    differentiable(config.reward if reward is None else reward)
    if pipe is None:
        model_named(config.model)


def summarised(config: RenoConfig, found: Sequence[Result]) -> dict[str, Any]:
    """What optimize.json says: the settings, and each prompt's rewards, iteration by iteration."""
    prompts = []
    for i, (result, row) in enumerate(rows(found)):
        curve = [
            {
                "rewards": {name: scores[row].item() for name, scores in record.parts.items()},
                "total": record.total[row].item(),
                "regularizer": record.regularizer[row].item(),
                "grad_norm": record.grad_norm[row].item(),
            }
            for record in result.history
        ]
        before, after = result.rewards_before[row].item(), result.rewards[row].item()
        entry = {"prompt": config.prompt[i], "seed": config.seed + i, "reward_before": before, "reward_after": after}
        entry["norm_before"] = result.noises_before[row].norm().item()
        entry["norm_after"] = result.noises[row].norm().item()
        prompts.append({**entry, "history": curve})
    mean = {
        "reward_before": torch.cat([result.rewards_before for result in found]).mean().item(),
        "reward_after": torch.cat([result.rewards for result in found]).mean().item(),
    }
    return {"settings": asdict(config), **mean, "iterations": config.iterations, "prompts": prompts}


def files(found: Sequence[Result]) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the pictures and of the noise."""
    pictures = []
    for i, (result, row) in enumerate(rows(found)):
        for when, images in (("before", result.images_before), ("after", result.images)):
            picture = images[row].permute(1, 2, 0).float().cpu().numpy()
            pictures.append(picture)
            yield f"{i:03d}-{when}.png", png(picture)
    yield "grid.png", grid(pictures, columns=2)
    noises = {
        "noise": torch.cat([result.noises for result in found]).cpu(),
        "noise_before": torch.cat([result.noises_before for result in found]).cpu(),
    }
    yield "noise.safetensors", save(noises)


def rows(found: Sequence[Result]) -> Iterator[tuple[Result, int]]:
    for result in found:
        for row in range(len(result.images)):
            yield result, row
