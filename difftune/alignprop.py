"""AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler (https://arxiv.org/abs/2310.03739).

    maximise  J(theta) = E_{c, x_T} [ R(decode(x_0(theta, x_T, c)), c) ]

The gradient goes through the reward, the VAE's decoder and the last K steps of the sampler; K is drawn anew for each
optimiser step. `train` is the algorithm, `run` what the command line does with it.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from difftune import checkpoint, lora, runs
from difftune.checkpoint import Randomness, Say, State
from difftune.configs import AlignPropConfig
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
from difftune.errors import RunError
from difftune.models import load as load_model
from difftune.named import (
    at_least,
    differentiable,
    gradient_named,
    guidance_named,
    known,
    model_named,
    reward_named,
    sampler_named,
)
from difftune.prompts import Prompts, prompts_named
from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from solvers.budget import Plan, Probe, probe
from solvers.latent import LatentModel, NetworkDenoiser
from solvers.noise import Noise
from solvers.rollout import rollout
from solvers.samplers import Step, gaussian

Metrics = dict[str, float]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


class Reward(Protocol):
    """`rewards.registry.Reward`, or anything like it."""

    @property
    def differentiable(self) -> bool: ...
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


# ------------------------------------------------------------------------------------------------ the algorithm


def alignprop_loss(scores: Tensor, coefficient: float = 1.0) -> Tensor:
    """L = -coefficient * mean_b R_b, for scores (B,)."""
    return -coefficient * scores.mean()


def kept_steps(config: AlignPropConfig, step: int) -> int:
    """K ~ Uniform{truncation_min, ..., truncation_max}, one draw per optimiser step, the same in every process.

    The suffix rule, which is the paper's: the last K steps carry gradient. (Its released code draws anew at every
    sampler step, and so keeps step i with probability (i + 1) / 51.)
    """
    most = greatest(config)
    return random.Random(f"{config.seed} {step}").randint(min(config.truncation_min, most), most)


def train(
    config: AlignPropConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given. The pipeline gets the adapter, and keeps it. `say` is told what
    was resolved: the gradient mode, the attention, the plan for a memory budget.
    Raises UserError for settings that cannot be, RunError where a reward or a gradient is not finite: the weights are
    then those of the state yielded last.
    """
    check(config, pipe, reward)
    reward = reward_named(config.reward) if reward is None else reward
    prompts = prompts_named(config.prompts, config.seed)
    pipe = load_model(config.model) if pipe is None else pipe
    accelerator = Accelerator(cpu=runs.on_cpu(), mixed_precision=config.mixed_precision)
    rank, world = accelerator.process_index, accelerator.num_processes

    pipe.to(accelerator.device)
    if config.mixed_precision != "no":
        pipe.to(dtype=DTYPES[config.mixed_precision])
    dtype = lora.network_of(pipe).dtype
    weights = lora.add(pipe, config.rank, config.lora_alpha, config.lora_dropout, config.seed)
    optimizer = adamw(config, weights.values())
    if state is not None:
        resume(config, state, accelerator, lora.network_of(pipe), optimizer)
    network, optimizer = accelerator.prepare(lora.network_of(pipe), optimizer)
    chain = Chain.of(config, pipe, Called(network, dtype))
    rate = learning_rates(config)

    with running(config, chain, prompts, reward, weights, say) as plan:
        reward = one_at_a_time(reward, plan)
        for step in range(state.step if state else 0, config.max_train_steps):
            started = time.perf_counter()
            gradient = mode_of(config, plan, step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(step)
            network.train()
            parts = passes(config, plan, step, rank, world)
            scores = []
            for i, indices in enumerate(parts):
                with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(network):
                    scores.append(backward(config, chain, prompts, reward, indices, gradient, accelerator, step))
            norm = clipped(accelerator, weights, config.max_grad_norm, step)
            optimizer.step()
            optimizer.zero_grad()
            network.eval()

            everyone = accelerator.gather(torch.cat(scores).detach())
            metrics = {
                "step": step + 1,
                **statistics(everyone),
                "loss": alignprop_loss(everyone, config.loss_coeff).item(),
                "grad_norm": norm,
                "lr": optimizer.param_groups[0]["lr"],
                "K": carrying(gradient, config.num_inference_steps),
                "seconds": time.perf_counter() - started,
            }
            yield metrics, snapshot(config, accelerator, step + 1, weights, optimizer, metrics)


@contextmanager
def running(
    config: AlignPropConfig,
    chain: "Chain",
    prompts: Prompts,
    reward: Reward,
    weights: Mapping[str, Tensor],
    say: Say | None,
) -> Iterator[Plan]:
    """The engine as it is set for this run: kernels, and the plan, under its block checkpointing."""
    pipe, network = chain.model.pipe, chain.model.network
    with kernels(config.enable_xformers_memory_efficient_attention, config.deterministic, network) as found:
        plan = planned(config, chain, prompts, reward, weights)
        for name, line in Engine(plan, found, config.deterministic).lines(resolved(config, plan)).items():
            (say or quiet)(f"{name}: {line}")
        with plan.applied(network, pipe.vae):
            yield plan


def planned(
    config: AlignPropConfig, chain: "Chain", prompts: Prompts, reward: Reward, weights: Mapping[str, Tensor]
) -> Plan:
    """The plan for the budget, from one step on the first sample.

    Where every step carries gradient, the mode is the plan's to choose; else it is the greatest truncation.
    """
    gradient = config.gradient or (None if exact(config) else f"truncated:{greatest(config)}")

    def measure(limit: int | None) -> Probe:
        texts, x, noise, predict = chain.begin(prompts, [0], gradient)
        chain.model.network.train()
        found = probe(
            probe_step(gradient, chain.step),
            predict,
            x,
            chain.levels,
            noise,
            network=chain.model.network,
            decode=lambda x: chain.model.decode(x, checkpointed=True),
            decoder=chain.model.pipe.vae,
            rewards=scores_of(reward, texts),
            held=held(chain.model, sum(weight.nbytes for weight in weights.values())),
            limit=limit,
        )
        chain.model.network.eval()
        return found

    return plan_for(config.memory_budget, gradient, config.num_inference_steps, config.train_batch_size, measure)


def greatest(config: AlignPropConfig) -> int:
    """The greatest K that is drawn."""
    return min(config.truncation_max, config.num_inference_steps)


def exact(config: AlignPropConfig) -> bool:
    """Whether every step carries gradient, whatever K is drawn."""
    return min(config.truncation_min, greatest(config)) == config.num_inference_steps


def mode_of(config: AlignPropConfig, plan: Plan, step: int) -> str:
    """The engine's mode in one optimiser step."""
    if config.gradient is None and not (config.memory_budget and exact(config)):
        return f"truncated:{kept_steps(config, step)}"
    return plan.gradient


def passes(config: AlignPropConfig, plan: Plan, step: int, rank: int, world: int) -> list[range]:
    """The samples of each backward pass of one optimiser step, in one process."""
    batches = (samples(config, step, batch, rank, world) for batch in range(config.gradient_accumulation_steps))
    return [indices for batch in batches for indices in plan.split(batch)]


def backward(
    config: AlignPropConfig,
    chain: "Chain",
    prompts: Prompts,
    reward: Reward,
    indices: range,
    gradient: str,
    accelerator: Accelerator,
    step: int,
) -> Tensor:
    """One backward pass: the gradient is added to the weights', the scores (B,) are returned."""
    images, texts = chain(prompts, indices, gradient)
    scores = scored(reward, images, texts, step)
    share = len(indices) / config.train_batch_size / config.gradient_accumulation_steps
    try:
        accelerator.backward(share * alignprop_loss(scores, config.loss_coeff))
    except FloatingPointError as error:  # of a sweep, or of a run that is watched
        raise RunError(f"step {step + 1}: {error}; checkpoints are as they were") from error
    return scores.detach()


def quiet(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Chain:
    """From prompts and noise to images, differentiable in the network's weights."""

    model: LatentModel
    denoiser: NetworkDenoiser
    guidance: Guidance
    step: Step
    levels: Sequence[Noise]
    seed: int

    @classmethod
    def of(cls, config: AlignPropConfig, pipe: Any, network: "Called") -> "Chain":
        model = LatentModel(pipe)
        guidance = guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
        denoiser = replace(model.denoiser, network=network)
        levels = model.levels(config.num_inference_steps)
        return cls(model, denoiser, guidance, sampler_named(config.sampler), levels, config.seed)

    def __call__(self, prompts: Prompts, indices: Sequence[int], gradient: str) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) in [0, 1] and their prompts. A sample's noise depends on the seed and its index alone."""
        texts, x, noise, predict = self.begin(prompts, indices, gradient)
        path = rollout(step_of(gradient, self.step), predict, x, self.levels, gradient, noise)
        copies = len(path.x) // len(x)  # draft_lv's, copy after copy
        return self.model.decode(path.x, checkpointed=True), texts * copies

    def begin(
        self, prompts: Prompts, indices: Sequence[int], gradient: str | None
    ) -> tuple[list[str], Tensor, list[Tensor] | None, GuidedPredict]:
        """Prompts, initial noise, the noise of a stochastic sampler, and the guided network."""
        texts = [prompts(i) for i in indices]
        generators = [torch.Generator().manual_seed(mixed(self.seed, i)) for i in indices]
        with torch.no_grad():
            conds = self.model.encode(texts)
            x = self.model.noise(len(texts), generators)
            drawn, steps = wants_noise(gradient, self.step), len(self.levels) - 1
            noise = [gaussian(x, generators) for _ in range(steps)] if drawn else None
        return texts, x, noise, guided(self.denoiser, self.guidance, conds)


@dataclass(frozen=True)
class Called:
    """The network that accelerate prepared: under DDP, gradients meet only where the wrapper itself is called."""

    prepared: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.prepared(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.prepared.parameters()


def samples(config: AlignPropConfig, step: int, batch: int, rank: int, world: int) -> range:
    """The run's samples are numbered: these are one process's in one backward pass."""
    size = config.train_batch_size
    start = ((step * config.gradient_accumulation_steps + batch) * world + rank) * size
    return range(start, start + size)


def mixed(seed: int, index: int) -> int:
    """One seed of two numbers, unlike for any other two."""
    return random.Random(f"{seed} noise {index}").getrandbits(63)


def scored(reward: Reward, images: Tensor, prompts: Sequence[str], step: int) -> Tensor:
    """The scores (B,). Raises RunError where one is not finite."""
    try:
        scores = reward(images, prompts)
    except ValueError as error:
        raise RunError(f"step {step + 1}: {error}; checkpoints are as they were") from error
    if not scores.isfinite().all():
        of = prompts[int(scores.isfinite().int().argmin())]
        raise RunError(f"step {step + 1}: the reward for {of!r} is not finite; checkpoints are as they were")
    return scores


def clipped(accelerator: Accelerator, weights: Mapping[str, Tensor], limit: float, step: int) -> float:
    """Clip the gradient and return its norm before. Raises RunError where that is not finite.

    Under float16 the loss scaler finds its scale by overflowing: it then skips the step by itself.
    """
    norm = float(accelerator.clip_grad_norm_(list(weights.values()), limit))
    if not norm < float("inf") and accelerator.scaler is None:
        raise RunError(f"step {step + 1}: the gradient's norm is {norm}; checkpoints are as they were")
    return norm if norm < float("inf") else -1.0


def adamw(config: AlignPropConfig, weights: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(weights),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def learning_rates(config: AlignPropConfig) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step: nothing to save."""
    schedule = get_scheduler(
        config.lr_scheduler,
        torch.optim.SGD([torch.zeros(())], lr=1.0),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return schedule.lr_lambdas[0]


def statistics(scores: Tensor) -> Metrics:
    spread = scores.std(correction=0)
    return {
        "reward_mean": scores.mean().item(),
        "reward_std": spread.item(),
        "reward_min": scores.min().item(),
        "reward_max": scores.max().item(),
    }


def carrying(gradient: str, steps: int) -> int:
    """How many sampler steps carry gradient in a mode of the engine."""
    name, _, option = gradient.partition(":")
    return int(option.partition(":")[0]) if name == "truncated" else steps


# ------------------------------------------------------------------------------------------------ state


def snapshot(
    config: AlignPropConfig,
    accelerator: Accelerator,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Any,
    metrics: Metrics,
) -> State:
    """Everything that the next step depends on, copied."""
    tensors = {f"lora.{name}": weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"adam.{key}.{name}": value.clone() for key, value in optimizer.state[weight].items()}
    everyone = gather_object([checkpoint.randomness()])
    for rank, own in enumerate(everyone):
        tensors |= {f"rng.{rank}.{key}": value for key, value in own.tensors.items()}
    info = {
        "cursor": samples(config, step, 0, 0, accelerator.num_processes).start,
        "num_processes": accelerator.num_processes,
        "config": asdict(config),
        "metrics": metrics,
        "rng": [own.info for own in everyone],
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    return State(step, tensors, info)


def resume(
    config: AlignPropConfig, state: State, accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    """Put back what `snapshot` took. Raises UserError if the state is of other settings, which it names."""
    runs.same_run(config, state)
    lora.load(network, owned(state.tensors, "lora."))
    for key in ("step", "exp_avg", "exp_avg_sq"):
        values = owned(state.tensors, f"adam.{key}.")
        for name, weight in lora.weights(network).items():
            optimizer.state[weight][key] = values[name].clone().to("cpu" if key == "step" else weight.device)
    rank = accelerator.process_index
    checkpoint.restore(Randomness(owned(state.tensors, f"rng.{rank}."), state.info["rng"][rank]))
    if accelerator.scaler is not None and state.info["scaler"]:
        accelerator.scaler.load_state_dict(state.info["scaler"])


def owned(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ the command


def run(
    config: AlignPropConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """`difftune train alignprop`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    state = runs.starting_state(config, show)
    reward = reward_named(config.reward) if reward is None else reward
    pipe = load_model(config.model) if pipe is None else pipe
    steps = train(config, state, pipe, reward, runs.resolving(config, show))
    return runs.run(config, steps, state, pipe, lambda last: card(config, last))


def check(config: AlignPropConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    names = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_inference_steps", "rank")
    at_least(1, **{name: asdict(config)[name] for name in (*names, "checkpointing_steps", "truncation_min")})
    at_least(config.truncation_min, truncation_max=config.truncation_max)
    at_least(1, checkpoints_total_limit=config.checkpoints_total_limit or 1)
    at_least(0, learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm)
    known("mixed_precision", config.mixed_precision, DTYPES)
    known("lr_scheduler", config.lr_scheduler, SCHEDULES)
    sampler_named(config.sampler)
    guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
    if config.gradient is not None:
        gradient_named(config.gradient, config.num_inference_steps, config.sampler)
    check_engine(config.memory_budget, config.enable_xformers_memory_efficient_attention)
    differentiable(config.reward if reward is None else reward)
    if pipe is None:
        model_named(config.model)
    prompts_named(config.prompts, config.seed)


def resolved(config: AlignPropConfig, plan: Plan) -> str:
    """The engine's mode in words."""
    if config.gradient is not None or (config.memory_budget and exact(config)):
        return plan.gradient
    most = greatest(config)
    return f"truncated:K, K ~ U{{{min(config.truncation_min, most)}..{most}}} anew for each optimiser step"


def card(config: AlignPropConfig, metrics: Metrics) -> str:
    """The model card."""
    rewards = ", ".join(config.reward)
    return f"""---
base_model: {config.model}
library_name: diffusers
tags: [lora, text-to-image, reward, alignprop, difftune]
---

# LoRA of {config.model}, trained on {rewards}

AlignProp ([2310.03739](https://arxiv.org/abs/2310.03739)) by difftune: {config.max_train_steps} optimiser steps of
{config.train_batch_size * config.gradient_accumulation_steps} images (per process), rank {config.rank}, seed
{config.seed}. Mean training reward of the last step: {metrics.get("reward_mean", float("nan")):.4f}. A reward that is
trained on is no evidence of quality: evaluate on another.

```python
pipe.load_lora_weights("{config.output_dir}")
image = pipe("...", num_inference_steps={config.num_inference_steps}).images[0]
```

Every setting is in `config.yaml`, every step in `metrics.jsonl`; `difftune train alignprop --config config.yaml
--output_dir NEW` runs it again.
"""
