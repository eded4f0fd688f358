"""What every recipe shares: the weights that are trained, their optimiser, one step of it, and a run's whole state.

A recipe is a Config, a loss and a generator; it calls these functions, and none of them calls it back:

    run = begin(config, state, pipe)
    yield from steps(config, run, lambda step: gradients_and_update(...))
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from difftune import processes
from difftune.configs.training import TrainingConfig
from difftune.errors import RunError, UserError
from difftune.files import checkpoint
from difftune.files.checkpoint import Randomness, Say, State
from difftune.files.prompts import prompts_named
from difftune.lookup import at_least, guidance_named, known, model_named, reward_named, sampler_named
from difftune.models import load as load_model
from difftune.models import scheduler_of
from difftune.pipelines import full_weights, lora
from difftune.pipelines.engine import check_engine
from difftune.pipelines.method_parts import check_trainable
from difftune.training import optimizers, run_folder, validation
from difftune.training.optimizers import OPTIMIZERS
from difftune.training.reward_statistics import PerPrompt
from rewards.errors import NotFinite
from solvers.rollout.run import unchecked_gradients, watch_gradients, watching

Metrics = dict[str, float]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


class Reward(Protocol):
    """`rewards.registry.Reward`, or anything like it."""

    @property
    def differentiable(self) -> bool: ...
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Called:
    """The network that accelerate prepared: under DDP, gradients meet only where the wrapper itself is called."""

    prepared: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.prepared(*args, **kwargs)

    @property
    def config(self) -> Any:
        """Of the network, which some families' calls look into."""
        return self._network.config

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Of the network: what a guidance method patches."""
        return self._network.named_modules()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self._network.named_children()

    @property
    def _network(self) -> Any:
        return self.prepared.module if isinstance(self.prepared, DistributedDataParallel) else self.prepared

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.prepared.parameters()


@dataclass(frozen=True)
class Reference(Called):
    """The model that training began with: the same network without its adapter, or a copy of it.

    The adapter is off inside the call alone, so that a call which is recomputed on the way back is without it too, and
    no weight's `requires_grad` changes. Nothing is differentiated.
    """

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with lora.off(self.prepared):
            return self.prepared(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


class Kept(NamedTuple):
    """What a recipe itself must find again, as `Training.own` of a resumed run."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]


def nothing() -> Kept:
    return Kept({}, {})


@dataclass
class Training:
    """What a run trains and with what; made by `begin`."""

    pipe: Any
    accelerator: Accelerator
    network: Called
    weights: Mapping[str, Tensor]  # trained, by name
    optimizer: Any
    rate: Callable[[int], float]  # the learning rate's factor
    average: "Average | None" = None  # of the weights
    base: nn.Module | None = None  # the network before full fine-tuning, where a recipe asked for it
    done: int = 0  # optimiser steps before this process began
    skipped: int = 0  # of them and since, how many were not finite
    seen: PerPrompt = field(default_factory=PerPrompt)  # the rewards of each prompt, in all processes
    own: Kept = field(default_factory=nothing)  # what a recipe gave `snapshot`, of the resumed state

    @property
    def reference(self) -> Reference:
        """The network as it was before training, to be called as `network` is.

        Raises UserError under full fine-tuning unless `begin` was asked for it.
        """
        if self.base is None and not lora.adapted(self.network.prepared):
            raise UserError("this recipe keeps no copy of the network for --full_finetuning: train a LoRA with it")
        return Reference(self.base or self.network.prepared, self.network.dtype)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @contextmanager
    def learning(self, last: bool = True) -> Iterator[None]:
        """Around a forward and its backward pass: dropout is on, and the processes' gradients meet in the `last`.

        A latent's gradient that is not finite is told with the sampler's step, but for several processes, which must
        agree on what to do, and under a loss scaler, which finds its scale by overflowing: there it passes on.
        """
        network = self.network.prepared
        network.train()
        named = self.world == 1 and self.accelerator.scaler is None and watching() is None
        try:
            with (
                watch_gradients(lambda index, norm: None) if named else unchecked_gradients(),
                nullcontext() if last else self.accelerator.no_sync(network),
            ):
                yield
        finally:
            network.eval()


@dataclass
class Average:
    """The exponential moving average of the weights, as diffusers' EMAModel takes it.

    e <- d e + (1 - d) w after each update, with d = min(decay, (1 + n) / (10 + n)) for n updates before, and the first
    is a copy.
    """

    decay: float
    tensors: dict[str, Tensor]
    updates: int = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        for name, weight in weights.items():
            self.tensors[name].lerp_(weight.detach(), 1 - decay)
        self.updates += 1


def begin(config: TrainingConfig, state: State | None, pipe: Any, reference: bool = False) -> Training:
    """The pipeline on its device with an adapter to train, as it is at step 0 or as `state` has it.

    The pipeline keeps the adapter. reference: `Training.reference` is to be called, for which full fine-tuning keeps a
    copy of the network. Raises UserError if the state is of other settings, which it names.
    """
    if state is not None:
        run_folder.same_run(config, state)
    accelerator = Accelerator(cpu=processes.on_cpu(), mixed_precision=config.mixed_precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed keeps the optimiser to itself, so that no step could be resumed: use DDP or FSDP2")
    pipe.to(accelerator.device)
    if config.mixed_precision != "no":
        pipe.to(dtype=DTYPES[config.mixed_precision])
    network = lora.network_of(pipe)
    base = deepcopy(network).requires_grad_(False) if reference and config.full_finetuning else None
    weights, dtype = trainable(config, pipe)
    if state is not None:
        lora.load(network, owned(state.tensors, "weights."))
    optimizer = OPTIMIZERS[config.optimizer](config, weights.values())
    prepared, optimizer = accelerator.prepare(network.eval(), optimizer)  # a new adapter's dropout is on
    weights = lora.weights(accelerator.unwrap_model(prepared))  # FSDP puts others in their place
    average = None if config.ema_decay is None else Average(config.ema_decay, copied(weights))
    run = Training(
        pipe, accelerator, Called(prepared, dtype), weights, optimizer, learning_rates(config), average, base
    )
    if state is not None:
        resume(run, state)
    return run


def trainable(config: TrainingConfig, pipe: Any) -> tuple[dict[str, Tensor], torch.dtype]:
    """The weights to train, by name, and the type that the network is called with."""
    if config.full_finetuning:
        return full_weights.add(pipe), torch.float32
    dtype = lora.network_of(pipe).dtype
    layout = config.lora_layers
    return lora.add(pipe, config.rank, config.lora_alpha, config.lora_dropout, config.seed, layout), dtype


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------ one step


def samples(config: TrainingConfig, step: int, batch: int, rank: int, world: int) -> range:
    """The run's samples are numbered: these are one process's in one backward pass."""
    size = config.train_batch_size
    start = ((step * config.gradient_accumulation_steps + batch) * world + rank) * size
    return range(start, start + size)


def mixed(seed: int, index: int, of: str = "noise") -> int:
    """One seed of two numbers and a name, unlike for any others."""
    return random.Random(f"{seed} {of} {index}").getrandbits(63)


def steps(
    config: TrainingConfig,
    run: Training,
    one: Callable[[int], Metrics],
    kept: Callable[[], Kept] = nothing,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step that is left, which `one` takes; `kept` is for `snapshot`."""
    for step in range(run.done, config.max_train_steps):
        metrics = attempt(config, run, step, one)
        yield metrics, snapshot(config, run, step + 1, metrics, kept())


def attempt(config: TrainingConfig, run: Training, step: int, one: Callable[[int], Metrics]) -> Metrics:
    """The metrics of one optimiser step, which `one` takes: scores, backward passes, `update`.

    A step with a reward or a gradient that is not finite is skipped in every process, and counted. Raises RunError,
    with the step, for the first beyond `config.max_skipped_steps`.
    """
    started = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.rate(step)
    try:
        found = one(step)
    except NotFinite as error:
        run.optimizer.zero_grad()
        run.skipped += 1
        if run.skipped > config.max_skipped_steps:
            raise RunError(f"step {step + 1}: {error}; checkpoints are as they were") from error
        processes.shown(f"step {step + 1} is skipped, {run.skipped} of {config.max_skipped_steps}: {error}")
        found = {}
    rest = {"lr": run.optimizer.param_groups[0]["lr"], "skipped": run.skipped}
    return {"step": step + 1, **found, **rest, "seconds": time.perf_counter() - started}


def scored(reward: Reward, images: Tensor, prompts: Sequence[str], run: Training) -> Tensor:
    """The scores (B,). Raises NotFinite, in every process, where one of any process is not finite."""
    scores, fault = None, None
    try:
        scores = reward(images, prompts)
        if not scores.isfinite().all():
            fault = f"the reward for {prompts[int(scores.isfinite().int().argmin())]!r} is not finite"
    except NotFinite as error:
        fault = str(error)
    everyone = gather_object([(fault, prompts, None if scores is None else scores.detach().tolist())])
    for found, _, _ in everyone:
        if found is not None:
            raise NotFinite(found)
    for _, its, values in everyone:
        run.seen.update(its, values)
    assert scores is not None
    return scores


def differentiate(run: Training, loss: Tensor) -> None:
    """Add the loss's gradient to the weights'. Raises NotFinite where the engine meets one that is not finite."""
    try:
        run.accelerator.backward(loss)
    except FloatingPointError as error:
        if run.world > 1:  # the others are on their way to a gradient that will never come
            raise RunError(f"{error}; checkpoints are as they were") from error
        raise NotFinite(str(error)) from error


def update(config: TrainingConfig, run: Training) -> float:
    """Clip the gradient, take an optimiser step, and return the norm before the clip.

    Raises NotFinite where that is not finite. Under float16 the loss scaler finds its scale by overflowing: it then
    skips the step by itself, and -1 is returned, unless the loss is no longer scaled up at all.
    """
    norm = float(whole(run.accelerator.clip_grad_norm_(list(run.weights.values()), config.max_grad_norm)))
    fault, scaler = f"the gradient is not finite, its norm is {norm}", run.accelerator.scaler
    if not norm < float("inf") and scaler is None:
        raise NotFinite(fault)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if not norm < float("inf") and scaler.get_scale() < 1:
        raise NotFinite(f"{fault}, with its loss scaled by {scaler.get_scale():g}")
    if run.average is not None and not run.accelerator.optimizer_step_was_skipped:
        run.average.update(run.weights)
    return norm if norm < float("inf") else -1.0


def statistics(scores: Tensor) -> Metrics:
    """Mean, standard deviation and range of all processes' scores."""
    return {
        "reward_mean": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "reward_min": scores.min().item(),
        "reward_max": scores.max().item(),
    }


# ------------------------------------------------------------------------------------------------ the learning rate


def learning_rates(config: TrainingConfig) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step: nothing to save."""
    schedule = get_scheduler(
        config.lr_scheduler,
        torch.optim.SGD([torch.zeros(())], lr=1.0),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return schedule.lr_lambdas[0]


# ------------------------------------------------------------------------------------------------ state


def snapshot(
    config: TrainingConfig,
    run: Training,
    step: int,
    metrics: Metrics,
    own: Kept | None = None,
) -> State:
    """Everything that the next step depends on, copied. own: what the recipe must find as `run.own` when resumed."""
    own = own or nothing()
    kept = {f"own.{name}": whole(tensor) for name, tensor in own.tensors.items()}
    kept |= {f"weights.{name}": whole(weight) for name, weight in run.weights.items()}
    if run.average is not None:
        kept |= {f"ema.{name}": whole(tensor) for name, tensor in run.average.tensors.items()}
    numbers: dict[str, Any] = {}
    for name, weight in run.weights.items():
        for key, value in run.optimizer.state[weight].items():
            if isinstance(value, Tensor):
                kept[f"optimizer.{key}.{name}"] = whole(value)
            else:
                numbers[f"{key}.{name}"] = value
    everyone = gather_object([checkpoint.randomness()])
    for rank, its in enumerate(everyone):
        kept |= {f"rng.{rank}.{key}": value for key, value in its.tensors.items()}
    found = {
        "cursor": samples(config, step, 0, 0, run.world).start,
        "num_processes": run.world,
        "config": asdict(config),
        "metrics": metrics,
        "skipped": run.skipped,
        "updates": run.average.updates if run.average is not None else 0,
        "seen": run.seen.state(),
        "optimizer": numbers,
        "own": dict(own.info),
        "rng": [its.info for its in everyone],
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
    }
    return State(step, copied(kept), found)


def resume(run: Training, state: State) -> None:
    """Put back what `snapshot` took, but for the weights."""
    moments = {**owned(state.tensors, "optimizer."), **state.info["optimizer"]}
    for name, weight in run.weights.items():
        its = {key.removesuffix(f".{name}"): value for key, value in moments.items() if key.endswith(f".{name}")}
        run.optimizer.state[weight] = {key: placed(key, value, weight) for key, value in its.items()}
    if run.average is not None:
        run.average.updates = state.info["updates"]
        for name, tensor in owned(state.tensors, "ema.").items():
            run.average.tensors[name] = placed("ema", tensor, run.weights[name])
    if run.accelerator.scaler is not None and state.info["scaler"]:
        run.accelerator.scaler.load_state_dict(state.info["scaler"])
    run.done, run.skipped = state.step, state.info["skipped"]
    run.own = Kept(owned(state.tensors, "own."), state.info["own"])
    run.seen.load(state.info["seen"])
    checkpoint.restore(Randomness(owned(state.tensors, f"rng.{run.rank}."), state.info["rng"][run.rank]))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all processes where FSDP has divided it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(key: str, value: Any, weight: Tensor) -> Any:
    """An entry of the optimiser's state where the optimiser looks for it: torch's counter stays on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value.clone().to("cpu" if key == "step" else weight.device)


def owned(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ the command


def follow(
    config: TrainingConfig,
    train: Callable[..., Iterator[tuple[Metrics, State]]],
    card: Callable[[Any, Metrics], str],
    show: Say | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    gradient: bool | None = None,
) -> dict[str, Any]:
    """Train in `config.output_dir`, after the recipe's own check; returns a summary. See `runs.run`.

    gradient: the reward that config names is loaded for the training and its validations, with a gradient or without;
    None: `train` loads what it needs.
    """
    with run_folder.begun(config, show) as state:
        if reward is None and gradient is not None:
            reward = reward_named(config.reward, gradient=gradient)
        pipe = load_model(config.model) if pipe is None else pipe
        found = train(config, state, pipe, reward, run_folder.resolving(config, show))
        return run_folder.run(config, found, state, pipe, partial(card, config), reward)


def check(config: TrainingConfig, pipe: Any = None) -> None:
    """One sentence for the first shared setting that cannot be, before anything is loaded."""
    names = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_inference_steps", "rank")
    at_least(1, **{name: asdict(config)[name] for name in (*names, "checkpointing_steps")})
    at_least(1, checkpoints_total_limit=config.checkpoints_total_limit or 1)
    at_least(0, learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm)
    at_least(0, max_skipped_steps=config.max_skipped_steps)
    known("mixed_precision", config.mixed_precision, DTYPES)
    known("lr_scheduler", config.lr_scheduler, SCHEDULES)
    optimizers.check(known("optimizer", config.optimizer, OPTIMIZERS))
    known("lora_layers", config.lora_layers, lora.LAYOUTS)
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay is {config.ema_decay}: it must be at least 0 and less than 1")
    validation.check(config)
    sampler_named(config.sampler)
    method = guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
    check_engine(None, config.enable_xformers_memory_efficient_attention)
    if pipe is None:
        model_named(config.model)
    check_trainable(method, lambda: scheduler_of(config.model) if pipe is None else pipe.scheduler)
    prompts_named(config.prompts, config.seed)


def card(config: TrainingConfig, metrics: Metrics, recipe: str, source: str) -> str:
    """The model card. source: the method's name and paper, in markdown."""
    person = "labels" in asdict(config) and asdict(config)["labels"]
    rewards = "a person's labels" if person else ", ".join(config.reward)
    reward = (
        f" Mean training reward of the last step: {metrics['reward_mean']:.4f}." if "reward_mean" in metrics else ""
    )
    return f"""---
base_model: {config.model}
library_name: diffusers
tags: [lora, text-to-image, reward, {recipe}, difftune]
---

# LoRA of {config.model}, trained on {rewards}

{source} by difftune: {config.max_train_steps} optimiser steps of
{config.train_batch_size * config.gradient_accumulation_steps} images (per process), rank {config.rank}, seed
{config.seed}.{reward} A reward that is trained on is no evidence of quality: evaluate on another.

```python
pipe.load_lora_weights("{config.output_dir}")
image = pipe("...", num_inference_steps={config.num_inference_steps}).images[0]
```

Every setting is in `config.yaml`, every step in `metrics.jsonl`; `difftune train {recipe} --config config.yaml
--output_dir NEW` runs it again.
"""
